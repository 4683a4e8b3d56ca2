"""Test support: image builder and oracle, real servers, QEMU wrappers. Nothing here imports qedcore."""
