"""OpenAI's Files and Uploads: what clients leave on the server's disk.

A file is a row in the database and `<home>/files/<id>`; ids are made here, and a client's file name is no more than a
label. `form` reads multipart bodies as they come, `store` keeps files, `uploads` puts them together from parts.
"""
