"""Who may call what, how much, and what they did: keys, scopes, quotas, rate limits, usage, the audit log."""
