"""Vision towers by id, their files' layouts, and their fusion onto one grid."""
