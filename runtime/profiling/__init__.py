"""Profiling of sessions: where the time goes, by site, op and kernel, next to what reading memory takes at least."""
