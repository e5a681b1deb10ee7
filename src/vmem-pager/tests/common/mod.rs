//! What the tests share: streams as QEMU makes them, and images as they are read.

#![allow(dead_code, reason = "each test uses some of it")]

pub mod image;
pub mod process;
pub mod source;
