"""The HTTP edge: OpenAI-compatible routes over a handoff. The only place that imports the web framework."""
