"""The passes, one file each, in a folder per method family."""
