"""What operating and file systems do each in their own way: processes that outlive others, locks that are missing."""
