"""A client of the service `fastnnunet serve`: an image of this machine predicted by that one, on the base install.

archive     a DICOM series as a zip
client      the addresses of the service
job         an image sent, waited for, and its result written
"""
