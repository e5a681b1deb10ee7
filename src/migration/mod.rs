//! Moving a VM's memory and device state: cost follows the memory that is really used.

pub mod page_bitmap;
pub mod stream;
pub mod wire;
