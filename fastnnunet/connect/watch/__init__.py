"""A folder whose new images are predicted, once each, as soon as they are complete.

spec        the folders, and how long an image must be left alone
arrivals    images in the folder, and whether they still change
ledger      what became of each, on disk: what a restart goes on from
watcher     the loop
"""
