"""Where everything that must outlive a process is kept: keys, usage, files, batches, jobs.

SQLite in the home folder by default, PostgreSQL by URL. Tables belong to their owners' modules (`base.Base`), their
history to `migrations`.
"""

from llmasos.store.database.base import Base, BigInt, UtcDateTime, utc_now
from llmasos.store.database.database import Database

__all__ = ["Base", "BigInt", "Database", "UtcDateTime", "utc_now"]
