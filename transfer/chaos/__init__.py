"""A proxy to put between real workers, which does to their links what a seeded plan says (`tandem chaos`)."""
