//! QEMU's control socket (QMP).
