"""Installed applications, each a process of its own in the sandbox, behind this server's address."""
