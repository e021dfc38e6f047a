"""The local HTTP service, `fastnnunet serve`: bundles in memory, images in, label maps out.

    run         checks everything, then listens
    app         the addresses, on FastAPI; `monai`: those of MONAI Label
    guard       what every request passes: host, origin, token, size; the headers of every answer
    uploads/    what a client sends, put under names of our own; what is refused unopened
    jobs        one request each, kept in a folder that is bounded; `devices`: threads that hand them to
    worker      a child process with the models, the only one that opens images

The process that listens never decodes what a client sends: a file that crashes or hangs a reader costs one child.
"""
