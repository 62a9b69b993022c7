//! Guest programs. Each ends in HLT.

/// Assembles a program into a section of its own and names its bytes.
macro_rules! program {
    ($name:ident: $bits:literal, $($line:literal),+) => {
        std::arch::global_asm!(
            ".pushsection .rodata.guest,\"a\"",
            $bits,
            concat!("guest_", stringify!($name), "_begin:"),
            $($line,)+
            "hlt",
            concat!("guest_", stringify!($name), "_end:"),
            ".code64",
            ".popsection"
        );
        pub(crate) fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("guest_", stringify!($name), "_begin")]
                static BEGIN: u8;
                #[link_name = concat!("guest_", stringify!($name), "_end")]
                static END: u8;
            }
            let (begin, end) = (&raw const BEGIN, &raw const END);
            // SAFETY: both labels are in one section of this binary, the second after the first, and never written.
            unsafe { std::slice::from_raw_parts(begin, end.offset_from(begin).cast_unsigned()) }
        }
    };
}

program!(load_rsi: ".code64", "mov rax, [rsi]");
program!(store_byte: ".code64", "mov byte ptr [rdi], 0x5a");
program!(store_rdi: ".code64", "mov rax, 0x1122334455667788", "mov [rdi], rax");
program!(movsb: ".code64", "movsb");
program!(rep_movsb: ".code64", "rep movsb");
program!(rep_stosq: ".code64", "mov rax, 0x1122334455667788", "rep stosq");
program!(repne_cmpsb: ".code64", "repne cmpsb");
program!(push: ".code64", "push 0x1234567");
program!(push_memory: ".code64", "push qword ptr [rsi]");
program!(pop_memory: ".code64", "pop qword ptr [rdi]");
program!(call: ".code64", "call 2f", "hlt", "2:");
program!(enter_leave: ".code64", "enter 16, 1", "leave");
program!(add_memory: ".code64", "mov eax, 77", "lock add [rdi], rax");
program!(xchg: ".code64", "mov eax, 77", "xchg [rdi], rax");
program!(bts: ".code64", "bts [rdi], rax");
program!(cmpxchg16b: ".code64", "mov eax, 1", "mov ebx, 2", "mov ecx, 3", "lock cmpxchg16b [rdi]");
program!(movups_load: ".code64", "movups xmm0, [rsi]", "movq rax, xmm0");
program!(movups_store: ".code64", "mov eax, 77", "movq xmm1, rax", "pshufd xmm1, xmm1, 0", "movups [rdi], xmm1");
program!(vmovups_store: ".code64", "vpcmpeqd xmm1, xmm1, xmm1", "vinsertf128 ymm1, ymm1, xmm1, 1", "vmovups [rdi], ymm1");
// Indices 0, 1, 2, 3; the mask leaves out element 3.
program!(vgather: ".code64",
    "mov rax, 0x0000000100000000", "movq xmm1, rax", "mov rax, 0x0000000300000002", "pinsrq xmm1, rax, 1",
    "pcmpeqd xmm2, xmm2", "xor eax, eax", "pinsrd xmm2, eax, 3",
    "vpgatherdd xmm0, [rsi + xmm1 * 4], xmm2", "movq rax, xmm0", "pextrq rbx, xmm0, 1");
// Only element 2 is stored.
program!(vmaskmov: ".code64",
    "pxor xmm2, xmm2", "mov eax, -1", "pinsrd xmm2, eax, 2", "vpmaskmovd [rdi], xmm2, xmm2");
program!(fxsave: ".code64", "fninit", "fxsave64 [rdi]");
program!(xsave: ".code64",
    "vpcmpeqd xmm1, xmm1, xmm1", "vinsertf128 ymm1, ymm1, xmm1, 1", "mov eax, 7", "xor edx, edx", "xsave64 [rdi]");
program!(jump: ".code64", "jmp rsi");
program!(crossing: ".code64", "mov eax, 0x12345678");
program!(divide: ".code64", "xor ecx, ecx", "mov eax, 1", "xor edx, edx", "div ecx");
program!(divide_by_memory: ".code64", "xor edx, edx", "mov eax, 1000", "div dword ptr [rsi]");
program!(int_ist: ".code64", "int 0x41");
program!(page_fault: ".code64", "mov rax, 0x40000000", "mov rax, [rax]");
program!(load_ds: ".code64", "mov ds, eax");
program!(iretq: ".code64", "iretq");
program!(real_store: ".code16", "mov word ptr es:[di], 0x1234");
program!(real_push: ".code16", "push 0x1234");
program!(real_rep_stos: ".code16", "mov ax, 0x1234", "rep stosw");
program!(real_int: ".code16", "int 0x40");
