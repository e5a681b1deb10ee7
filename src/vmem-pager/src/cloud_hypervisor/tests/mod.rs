//! Both roles against peers that behave as the stock Cloud Hypervisor does, every trap included.

mod guest;
mod saving;
mod source;
