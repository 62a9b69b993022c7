//! `gmem measure`: expected launch measurements, without any hardware.

pub(crate) mod amd;
