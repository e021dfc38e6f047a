"""Where images come from and results go to, other than folders that are named: around `api`, and no part of it.

http        one request to a server: time-outs, retries, limits, nothing secret in a message
multipart   messages of several parts, read and written piece by piece
dicomweb    a series fetched from an archive, its segmentation stored there
watch       a folder whose new images are predicted
remote      a client of the service `fastnnunet serve`; `slicer`: one for 3D Slicer, a file by itself
"""
