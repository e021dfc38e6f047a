"""Soft maps of a user's own in a teacher's place: read, checked against the cases, and brought onto their grid."""
