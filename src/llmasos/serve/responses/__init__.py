"""OpenAI's Responses API: answers that remember, stream as typed events, and may go on in the background.

`request` turns items into a conversation, `events` turns its answer into items, `store` keeps both, `service` runs
them, `routes` is the HTTP side.
"""
