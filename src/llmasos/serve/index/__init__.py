"""An index of packages that the server hosts: uploads, checks as jobs, reports, static JSON as that of a folder."""
