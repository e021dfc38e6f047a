"""DICOMweb (PS3.18): find a series in an archive, fetch it, predict it, store what was segmented, once.

spec        what is asked for, and the limits
archive     the three services of an archive: QIDO-RS, WADO-RS, STOW-RS
choose      the series that is meant, or which there are
identity    UIDs that are the same whenever the same is made of the same
job         all of it
"""
