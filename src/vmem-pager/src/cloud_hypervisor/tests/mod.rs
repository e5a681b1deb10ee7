//! Both roles against peers that behave as the stock Cloud Hypervisor does, every trap included.

mod handing_over;
mod huge_pages;
mod model;
mod on_demand;
mod recording;
mod restoring;
mod saving;
mod ways;
