"""OpenAI's Batches: files of requests, answered when there is room, through crashes and restarts.

`lines` reads input and checks it, `ledger` keeps results as they come, `answers` runs one line through the same code as
an HTTP request, `store` is the database side, `worker` runs batches, `routes` is the HTTP side.

How nothing is lost or doubled: a result is one line, appended to its file by one write before it counts. What the
files hold is what is done; a line that was cut short by a crash is cut off and its request answered again.
"""
