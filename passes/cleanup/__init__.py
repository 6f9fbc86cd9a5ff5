"""Cleanup: what exports and rewrites leave behind."""
