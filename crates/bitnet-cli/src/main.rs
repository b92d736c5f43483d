//! The `bitnet` program.
fn main() {}
