//! The order in which a guest touches its memory.
