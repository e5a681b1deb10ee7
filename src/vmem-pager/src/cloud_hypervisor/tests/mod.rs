//! Both roles against peers that behave as the stock Cloud Hypervisor does, every trap included.

mod guest;
mod handing_over;
mod receiver;
mod restoring;
mod saving;
mod source;
