//! How weights are packed in files, and back.

pub mod blocks;
pub mod q2_0;
pub mod tile;
pub mod tq;
