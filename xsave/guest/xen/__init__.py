"""The emulated Xen: machine memory, page types, vCPUs on Unicorn, hypercalls.

It knows nothing of images and of which kernel runs on it; the toolstack reaches it through
`domctl` alone.
"""
