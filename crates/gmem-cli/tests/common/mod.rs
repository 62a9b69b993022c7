//! A client under `gmem run` that is the test program itself, run again with the name of a part in the environment. It uses libc
//! only and knows nothing of gmem.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::ffi::{c_int, c_ulong};
use std::process::Command;

/// The variable that names the part.
const PART: &str = "GMEM_TEST_PART";

pub(crate) const KVM_CREATE_VM: c_ulong = 0xae01;
pub(crate) const KVM_CREATE_VCPU: c_ulong = 0xae41;
pub(crate) const KVM_RUN: c_ulong = 0xae80;
pub(crate) const KVM_CREATE_GUEST_MEMFD: c_ulong = 0xc040_aed4;
pub(crate) const KVM_SET_MEMORY_ATTRIBUTES: c_ulong = 0x4020_aed2;
pub(crate) const KVM_SET_USER_MEMORY_REGION: c_ulong = 0x4020_ae46;

pub(crate) const PAGE: u64 = 4096;
/// The attribute.
pub(crate) const PRIVATE: u64 = 8;

/// The part that this program is to be, as a client.
pub(crate) fn part() -> String {
    std::env::var(PART).unwrap_or_default()
}

/// Whether there is a KVM to run anything with; says so if not.
pub(crate) fn has_kvm() -> bool {
    let open = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if open.is_err() {
        eprintln!("skipped: /dev/kvm is missing or cannot be opened");
    }
    open.is_ok()
}

/// Runs a part of this program's under gmem, by its test `client`, or says what is missing.
pub(crate) fn under_gmem(part: &str) {
    if !has_kvm() {
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_gmem"))
        .args(["run", "--emulate", "--profile", "linux-7.3", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "client", "--nocapture"])
        .env(PART, part)
        .output()
        .unwrap();
    assert!(output.status.success(), "{part}: {output:?}");
}

pub(crate) fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

pub(crate) fn ioctl(fd: c_int, request: c_ulong, arg: usize) -> Result<c_int, i32> {
    // SAFETY: each argument is a number, or the address of a structure of the request's size, or meant to be bad.
    let result = unsafe { libc::ioctl(fd, request, arg) };
    if result < 0 { Err(errno()) } else { Ok(result) }
}

pub(crate) fn open_kvm() -> Result<c_int, i32> {
    // SAFETY: a constant path.
    let fd = unsafe { libc::open(c"/dev/kvm".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    if fd < 0 { Err(errno()) } else { Ok(fd) }
}

pub(crate) fn try_protected_vm() -> Result<c_int, i32> {
    let kvm = open_kvm()?;
    let vm = ioctl(kvm, KVM_CREATE_VM, 1);
    // SAFETY: a descriptor of this function's.
    unsafe { libc::close(kvm) };
    vm
}

pub(crate) fn protected_vm() -> c_int {
    try_protected_vm().expect("a protected VM")
}

pub(crate) fn create_file(vm: c_int, size: u64) -> Result<c_int, i32> {
    let claim = [size, 0, 0, 0, 0, 0, 0, 0];
    ioctl(vm, KVM_CREATE_GUEST_MEMFD, claim.as_ptr().addr())
}

pub(crate) fn set_attributes(vm: c_int, start: u64, len: u64, attributes: u64) -> Result<c_int, i32> {
    let claim = [start, len, attributes, 0];
    ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, claim.as_ptr().addr())
}
