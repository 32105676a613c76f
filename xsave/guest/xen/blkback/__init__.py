"""The backend of a PV block device, as xen-blkback or a qdisk is one: pure protocol, no files.

    blkfront -- ring.py (requests, responses) -- requests.py (checked, grants mapped, a Job)
             -- xenstore (states) ------------- device.py
    Job.run(disk) moves the bytes wherever the host likes; device.complete(job) answers

xen/include/public/io/blkif.h is the protocol; whatever a guest writes into its ring or the store
costs it an error response or its device, never more.
"""
