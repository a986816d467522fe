"""Jobs of the server: work that goes on without the request that began it, in one list over all kinds."""
