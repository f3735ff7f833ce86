"""Every test of Outlast; a package so that they can share code by name."""
