"""Whole paths: several processes, real sockets, the command line. Few and marked."""
