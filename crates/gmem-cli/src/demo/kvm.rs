//! A small KVM client. It uses kvm-ioctls and libc as any VMM does, and nothing of gmem: whatever it is run on provides
//! the private memory.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use kvm_bindings::{
    KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_PRE_FAULT_MEMORY, KVM_CAP_VM_TYPES, KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_X86_SW_PROTECTED_VM, kvm_create_guest_memfd,
    kvm_memory_attributes, kvm_pre_fault_memory, kvm_regs, kvm_userspace_memory_region2,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use super::machine::{Access, Attempt, Machine, PAGE, Side, WITH_FILE, WITHOUT_FILE, Words};
use super::map::{Map, Page};

/// `_IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)`, which kvm-ioctls does not have.
const KVM_PRE_FAULT_MEMORY: libc::c_ulong = 0xC040_AED5;

/// The frame of the guest's program.
const CODE: Range<u64> = 1..2;
/// Stores eax, ecx, edx and ebx at ds:di and reports it; 16-bit code.
const STORE: [u8; 18] = [
    0x66, 0x89, 0x05, // mov [di], eax
    0x66, 0x89, 0x4d, 0x04, // mov [di + 4], ecx
    0x66, 0x89, 0x55, 0x08, // mov [di + 8], edx
    0x66, 0x89, 0x5d, 0x0c, // mov [di + 12], ebx
    0xe6, 0x10, // out 0x10, al
    0xf4, // hlt
];
/// Loads the same registers.
const LOAD: [u8; 18] = [
    0x66, 0x8b, 0x05, // mov eax, [di]
    0x66, 0x8b, 0x4d, 0x04, // mov ecx, [di + 4]
    0x66, 0x8b, 0x55, 0x08, // mov edx, [di + 8]
    0x66, 0x8b, 0x5d, 0x0c, // mov ebx, [di + 12]
    0xe6, 0x10, // out 0x10, al
    0xf4, // hlt
];
/// Where in the program LOAD begins.
const LOAD_AT: usize = 0x40;
/// Below the area in which some processors want three pages for real mode.
const TSS: usize = 0xfffb_d000;

/// Anonymous memory of the VMM that a guest uses too: it is copied in and out, never borrowed.
#[derive(Debug)]
struct Memory {
    at: *mut u8,
    len: usize,
}

impl Memory {
    fn new(pages: u64) -> Result<Self> {
        let len = usize::try_from(pages * PAGE)?;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, where the kernel likes.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        ensure!(at != libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
        Ok(Self { at: at.cast(), len })
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset.checked_add(bytes.len()).is_some_and(|end| end <= self.len));
        // SAFETY: within the mapping, which nothing borrows.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at.add(offset), bytes.len()) }
    }

    fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        // SAFETY: the whole of the mapping, which is readable.
        unsafe { std::ptr::copy_nonoverlapping(self.at, bytes.as_mut_ptr(), self.len) };
        bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own; a VM that still has it finds nothing there.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

#[derive(Debug)]
struct Vm {
    // Before the VM and its memory, so that it is closed first.
    vcpu: VcpuFd,
    vm: VmFd,
    _code: Memory,
}

/// Frames with their memory in the VMM.
#[derive(Debug)]
struct Slot {
    gfns: Range<u64>,
    memory: Memory,
}

/// The client: the VM, and what was asked of KVM so far.
#[derive(Debug)]
pub(super) struct Client {
    kvm: Kvm,
    vm: Option<Vm>,
    file: Option<File>,
    slots: Vec<Slot>,
    asked: Vec<String>,
    private: BTreeSet<u64>,
    /// Private frames that got memory. KVM does not tell: this is what was asked and granted.
    present: BTreeSet<u64>,
}

impl Client {
    /// A client without a VM.
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            kvm: Kvm::new().context("/dev/kvm")?,
            vm: None,
            file: None,
            slots: Vec::new(),
            asked: Vec::new(),
            private: BTreeSet::new(),
            present: BTreeSet::new(),
        })
    }

    fn ask(&mut self, what: impl Into<String>) {
        self.asked.push(what.into());
    }

    fn vm(&mut self) -> Result<&mut Vm> {
        self.vm.as_mut().context("there is no VM")
    }

    fn memory(&self, gfn: u64) -> Option<(&Memory, usize)> {
        let slot = self.slots.iter().find(|slot| slot.gfns.contains(&gfn))?;
        Some((&slot.memory, offset(gfn - slot.gfns.start)))
    }

    fn add_slot(&mut self, number: u32, gfns: Range<u64>, flags: u32) -> Result<()> {
        let memory = Memory::new(gfns.end - gfns.start)?;
        let file = if flags == 0 { None } else { self.file.as_ref() };
        let region = region(number, &gfns, &memory, file)?;
        let behind = if file.is_some() { ", guest_memfd" } else { "" };
        let (gpa, size) = (region.guest_phys_addr, region.memory_size);
        self.ask(format!("KVM_SET_USER_MEMORY_REGION2 {{slot {number}, gpa {gpa:#x}, size {size:#x}{behind}}}"));
        // SAFETY: the memory lives as long as the VM: both are fields of this client, the VM's first.
        unsafe { self.vm()?.vm.set_user_memory_region2(region) }.context("KVM_SET_USER_MEMORY_REGION2")?;
        self.slots.push(Slot { gfns, memory });
        Ok(())
    }

    /// Runs the program at `entry` on a frame.
    fn run(&mut self, entry: usize, gfn: u64, words: Words) -> Result<Access> {
        self.ask("KVM_RUN");
        let vcpu = &mut self.vm()?.vcpu;
        enter(vcpu, entry, gfn, words)?;
        let access = loop {
            match vcpu.run() {
                Ok(exit) => break access(&exit),
                Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
                Err(error) => break Some(Access::Other(format!("KVM_RUN: {error}"))),
            }
        };
        if let Some(access) = access {
            return Ok(access);
        }
        let words = words_of(&vcpu.get_regs()?);
        if self.private.contains(&gfn) {
            self.present.insert(gfn);
        }
        Ok(Access::Done(words))
    }

    fn page(&self, slot: Option<&Slot>, gfn: u64) -> Page {
        let backed = self.file.is_some() && WITH_FILE.contains(&gfn);
        match (slot, self.private.contains(&gfn)) {
            (None, false) => Page::NoSlot,
            (Some(_), false) => Page::Shared,
            (Some(_), true) if backed && self.present.contains(&gfn) => Page::Private,
            (Some(_), true) if backed => Page::Hole,
            (_, true) => Page::Fault,
        }
    }
}

fn offset(pages: u64) -> usize {
    usize::try_from(pages * PAGE).unwrap_or(usize::MAX)
}

fn region(
    number: u32,
    gfns: &Range<u64>,
    memory: &Memory,
    file: Option<&File>,
) -> Result<kvm_userspace_memory_region2> {
    Ok(kvm_userspace_memory_region2 {
        slot: number,
        flags: if file.is_some() { KVM_MEM_GUEST_MEMFD } else { 0 },
        guest_phys_addr: gfns.start * PAGE,
        memory_size: (gfns.end - gfns.start) * PAGE,
        userspace_addr: memory.at as u64,
        guest_memfd: file.map(|file| u32::try_from(file.as_raw_fd())).transpose()?.unwrap_or(0),
        ..Default::default()
    })
}

/// Real mode, with ds at the frame.
fn enter(vcpu: &VcpuFd, entry: usize, gfn: u64, words: Words) -> Result<()> {
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    (sregs.ds.base, sregs.ds.selector) = (gfn * PAGE, u16::try_from(gfn * PAGE / 16)?);
    vcpu.set_sregs(&sregs)?;
    let [rax, rcx, rdx, rbx] = registers(words);
    let rip = CODE.start * PAGE + entry as u64;
    vcpu.set_regs(&kvm_regs { rax, rbx, rcx, rdx, rip, rflags: 2, ..Default::default() })?;
    Ok(())
}

/// The words as the program takes them: eax, ecx, edx, ebx.
fn registers(words: Words) -> [u64; 4] {
    let (parts, _) = words.0.as_chunks::<4>();
    [0, 1, 2, 3].map(|part| u64::from(u32::from_le_bytes(parts[part])))
}

fn words_of(regs: &kvm_regs) -> Words {
    let mut words = Words::default();
    let (parts, _) = words.0.as_chunks_mut::<4>();
    for (part, register) in parts.iter_mut().zip([regs.rax, regs.rcx, regs.rdx, regs.rbx]) {
        part.copy_from_slice(&register.to_le_bytes()[..4]);
    }
    words
}

/// How an access ended, or `None` where the program came to its end.
fn access(exit: &VcpuExit<'_>) -> Option<Access> {
    match exit {
        VcpuExit::IoOut(..) => None,
        VcpuExit::MemoryFault { flags, gpa, size } => {
            let private = flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) != 0;
            let side = if private { Side::Private } else { Side::Shared };
            Some(Access::MemoryFault { gpa: *gpa, size: *size, side })
        }
        other => Some(Access::Other(format!("{other:?}"))),
    }
}

impl Machine for Client {
    fn create_vm(&mut self) -> Result<()> {
        self.ask("KVM_CHECK_EXTENSION(KVM_CAP_VM_TYPES)");
        let types = self.kvm.check_extension_raw(u64::from(KVM_CAP_VM_TYPES));
        ensure!(types & 1 << KVM_X86_SW_PROTECTED_VM != 0, "KVM has no type KVM_X86_SW_PROTECTED_VM: {types:#x}");
        self.ask("KVM_CREATE_VM(KVM_X86_SW_PROTECTED_VM)");
        let vm = self.kvm.create_vm_with_type(u64::from(KVM_X86_SW_PROTECTED_VM)).context("KVM_CREATE_VM")?;
        let code = Memory::new(CODE.end - CODE.start)?;
        code.write(0, &STORE);
        code.write(LOAD_AT, &LOAD);
        vm.set_tss_address(TSS).context("KVM_SET_TSS_ADDR")?;
        // SAFETY: the memory lives as long as the VM, in one struct.
        unsafe { vm.set_user_memory_region2(region(2, &CODE, &code, None)?) }.context("the program's slot")?;
        self.ask("KVM_CREATE_VCPU(0)");
        let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        self.vm = Some(Vm { vcpu, vm, _code: code });
        Ok(())
    }

    fn has_private_memory(&mut self) -> bool {
        self.ask("KVM_CHECK_EXTENSION(KVM_CAP_MEMORY_ATTRIBUTES)");
        let attributes = |vm: &Vm| vm.vm.check_extension_raw(u64::from(KVM_CAP_MEMORY_ATTRIBUTES));
        self.vm.as_ref().is_some_and(|vm| attributes(vm) & KVM_MEMORY_ATTRIBUTE_PRIVATE.cast_signed() != 0)
    }

    fn create_file(&mut self) -> Result<u64> {
        let size = (WITH_FILE.end - WITH_FILE.start) * PAGE;
        self.ask(format!("KVM_CREATE_GUEST_MEMFD {{size {size:#x}}}"));
        let request = kvm_create_guest_memfd { size, ..Default::default() };
        let fd = self.vm()?.vm.create_guest_memfd(request).context("KVM_CREATE_GUEST_MEMFD")?;
        // SAFETY: the descriptor is new and this client's own.
        let file = unsafe { File::from_raw_fd(fd) };
        let size = file.metadata()?.len();
        self.file = Some(file);
        Ok(size)
    }

    fn add_slot_with_file(&mut self) -> Result<()> {
        self.add_slot(0, WITH_FILE, KVM_MEM_GUEST_MEMFD)
    }

    fn add_slot_without_file(&mut self) -> Result<()> {
        self.add_slot(1, WITHOUT_FILE, 0)
    }

    fn set_side(&mut self, gfns: Range<u64>, side: Side) -> Result<()> {
        let (address, size) = (gfns.start * PAGE, (gfns.end - gfns.start) * PAGE);
        self.ask(format!("KVM_SET_MEMORY_ATTRIBUTES {{gpa {address:#x}, size {size:#x}, {side}}}"));
        let attributes = if side == Side::Private { u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) } else { 0 };
        let request = kvm_memory_attributes { address, size, attributes, flags: 0 };
        self.vm()?.vm.set_memory_attributes(request).context("KVM_SET_MEMORY_ATTRIBUTES")?;
        match side {
            Side::Private => self.private.extend(gfns),
            Side::Shared => self.private.retain(|gfn| !gfns.contains(gfn)),
        }
        Ok(())
    }

    fn guest_read(&mut self, gfn: u64) -> Result<Access> {
        self.run(LOAD_AT, gfn, Words::default())
    }

    fn guest_write(&mut self, gfn: u64, words: Words) -> Result<Access> {
        self.run(0, gfn, words)
    }

    fn host_read(&mut self, gfn: u64) -> Words {
        let found = self.memory(gfn).and_then(|(memory, at)| memory.read()[at..].first_chunk().copied());
        Words(found.unwrap_or_default())
    }

    fn host_write(&mut self, gfn: u64, words: Words) {
        if let Some((memory, at)) = self.memory(gfn) {
            memory.write(at, &words.0);
        }
    }

    fn host_finds(&mut self, words: Words) -> bool {
        let mut memories = self.slots.iter().map(|slot| slot.memory.read());
        memories.any(|bytes| bytes.windows(words.0.len()).any(|window| window == words.0))
    }

    fn try_file(&mut self) -> Vec<Attempt> {
        let Some(file) = &self.file else { return Vec::new() };
        let mut bytes = [0; 16];
        let again = format!("/proc/self/fd/{}", file.as_raw_fd());
        let ways = [
            ("read(2) of the file", { file }.read(&mut bytes).map(drop)),
            ("pread(2) of the file", file.read_at(&mut bytes, 0).map(drop)),
            ("mmap(2) of the file", map_file(file)),
            ("another open(2) through /proc", File::open(again).map(drop)),
        ];
        self.asked.extend(ways.iter().map(|(what, _)| (*what).to_owned()));
        ways.into_iter().map(|(what, result)| Attempt { what, refusal: result.err().map(|e| e.to_string()) }).collect()
    }

    fn punch(&mut self, gfns: Range<u64>) -> Result<()> {
        let (start, len) = ((gfns.start - WITH_FILE.start) * PAGE, (gfns.end - gfns.start) * PAGE);
        self.ask(format!("fallocate(FALLOC_FL_PUNCH_HOLE, offset {start:#x}, length {len:#x})"));
        let file = self.file.as_ref().context("there is no file")?;
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: only numbers are passed.
        let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, i64::try_from(start)?, i64::try_from(len)?) };
        ensure!(result == 0, "fallocate: {}", io::Error::last_os_error());
        self.present.retain(|gfn| !gfns.contains(gfn));
        Ok(())
    }

    fn prefault(&mut self, gfns: Range<u64>) -> Result<Option<u64>> {
        if self.kvm.check_extension_raw(u64::from(KVM_CAP_PRE_FAULT_MEMORY)) <= 0 {
            return Ok(None);
        }
        let (gpa, size) = (gfns.start * PAGE, (gfns.end - gfns.start) * PAGE);
        let mut request = kvm_pre_fault_memory { gpa, size, ..Default::default() };
        while request.size > 0 {
            self.ask(format!("KVM_PRE_FAULT_MEMORY {{gpa {:#x}, size {:#x}}}", request.gpa, request.size));
            let before = request.size;
            // SAFETY: the kernel reads and writes this structure, which has the size that the number says.
            let result = unsafe { libc::ioctl(self.vm()?.vcpu.as_raw_fd(), KVM_PRE_FAULT_MEMORY, &raw mut request) };
            ensure!(result == 0, "KVM_PRE_FAULT_MEMORY: {}", io::Error::last_os_error());
            if request.size == before {
                break;
            }
        }
        let done = gfns.start..request.gpa / PAGE;
        self.present.extend(done.filter(|gfn| self.private.contains(gfn)));
        Ok(Some(request.size))
    }

    fn close_file(&mut self) -> Result<()> {
        self.ask("close(guest_memfd)");
        self.file = None;
        Ok(())
    }

    fn map(&self) -> Map {
        let slot = |gfn: &u64| self.slots.iter().find(|slot| slot.gfns.contains(gfn));
        let pages = |gfns: Range<u64>| gfns.map(|gfn| self.page(slot(&gfn), gfn)).collect();
        Map(vec![pages(WITH_FILE), pages(WITHOUT_FILE)])
    }

    fn asked(&mut self) -> Vec<String> {
        std::mem::take(&mut self.asked)
    }
}

fn map_file(file: &File) -> io::Result<()> {
    let len = offset(WITH_FILE.end - WITH_FILE.start);
    // SAFETY: a new mapping, where the kernel likes.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping was made above and nothing uses it.
    unsafe { libc::munmap(at, len) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_travel_through_registers() {
        let words = Words(*b"0123456789abcdef");
        let [rax, rcx, rdx, rbx] = registers(words);
        assert_eq!(rax, u64::from(u32::from_le_bytes(*b"0123")));
        assert_eq!(words_of(&kvm_regs { rax, rcx, rdx, rbx, ..Default::default() }), words);
    }
}
