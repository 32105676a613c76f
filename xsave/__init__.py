"""xsave: save, restore and migrate Xen PV guests, in Xen's own formats, without a Xen host."""

__version__ = "0.1.0"
