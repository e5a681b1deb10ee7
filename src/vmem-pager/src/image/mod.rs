//! An image: one file in the mapped-ram layout.
