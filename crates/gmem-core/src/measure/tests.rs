//! Measurements of a small image against those that PyPI's `sev-snp-measure` 0.0.13 gives, and parsing of any bytes.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use proptest::prelude::*;

use super::launch::*;
use super::ovmf::*;
use super::vmsa::{VcpuReset, Vmm};
use crate::effort::{cases, some};

const SECTIONS: [(u32, u32, u32); 5] = [
    (0x80_0000, 0x3000, 1),
    (0x80_d000, 0x1000, 2),
    (0x80_e000, 0x1000, 3),
    (0x80_f000, 0x1000, 4),
    (0x81_0000, 0x1000, 0x10),
];
const METADATA: &str = "dc886566-984a-4798-a75e-5585a7bf67cc";
const HASH_TABLE: &str = "7255371f-3a3b-4b04-927b-1da6efa8d454";
const RESET_BLOCK: &str = "00f771de-1a7e-4fcb-890e-68c77e2fb44e";
const SVSM_INFO: &str = "a789a612-0597-4c4b-a49f-cbb1fe9d1ddd";
const FOOTER: &str = "96b582de-1fb2-45f7-baea-a366c55a082d";

/// The bytes of a GUID from its text.
fn guid(text: &str) -> Vec<u8> {
    let byte = |pair: &[u8]| u8::from_str_radix(core::str::from_utf8(pair).unwrap(), 16).unwrap();
    let group = |text: &str| text.as_bytes().chunks(2).map(byte).collect::<Vec<_>>();
    let mut groups: Vec<_> = text.split('-').map(group).collect();
    groups.iter_mut().take(3).for_each(|group| group.reverse());
    groups.concat()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn entry(data: &[u8], name: &str) -> Vec<u8> {
    let len = u16::try_from(data.len() + 18).unwrap();
    [data, &len.to_le_bytes(), &guid(name)].concat()
}

/// Two pages of a pattern, with metadata at the start of the second and the table 32 bytes before the end.
fn image(sections: &[(u32, u32, u32)], extra: &[u8]) -> Vec<u8> {
    let mut image: Vec<u8> = (0..8192u32).map(|i| (i * 7).to_le_bytes()[0]).collect();
    let count = u32::try_from(sections.len()).unwrap();
    let mut metadata = [b"ASEV".as_slice(), &words(&[16 + 12 * count, 1, count])].concat();
    sections.iter().for_each(|&(gpa, size, kind)| metadata.extend(words(&[gpa, size, kind])));
    image[4096..4096 + metadata.len()].copy_from_slice(&metadata);
    let body = [
        extra,
        &entry(&words(&[4096]), METADATA),
        &entry(&words(&[0x81_0400, 0x400]), HASH_TABLE),
        &entry(&words(&[0x80_b004]), RESET_BLOCK),
    ]
    .concat();
    let table = entry(&body, FOOTER);
    let end = 8192 - 32;
    image[end - table.len()..end].copy_from_slice(&table);
    image
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn vcpu(features: u64, vmm: Vmm) -> VcpuReset {
    VcpuReset { signature: 0x80_0f12, features, vmm }
}

fn boot() -> BootHashes {
    BootHashes::new(b"kernel", b"initrd", b"quiet")
}

fn snp(ovmf: &Ovmf<'_>, boot: Option<BootHashes>, vcpus: u32, vcpu: VcpuReset) -> Result<String, LaunchError> {
    let guest = SnpGuest { ovmf, firmware_digest: None, boot, vcpus, vcpu };
    let mut steps = Vec::new();
    let digest = guest.measure(|step| steps.push(step.digest))?;
    assert_eq!(steps.last(), Some(&digest));
    // A minute for Miri, which has the same with a kernel.
    if cfg!(miri) && boot.is_none() {
        return Ok(hex(&digest.digest()));
    }
    // The same guest from a firmware digest made before.
    let firmware = firmware_digest(ovmf, |_| {})?.digest();
    let resumed = SnpGuest { firmware_digest: Some(firmware), ..guest };
    assert_eq!(resumed.measure(|_| {})?, digest);
    Ok(hex(&digest.digest()))
}

#[test]
fn snp_guests_measure_as_the_reference_tool_says() {
    let image = image(&SECTIONS, &[]);
    let ovmf = Ovmf::parse(&image).unwrap();
    let vmms = [
        (Vmm::Qemu, "9a9cb6be5d50a11223cc958b2c97b2f917b6fa98a64ca2ca106083169fbe514cb62df7b0e51979aefbea06aee3a2f620"),
        (Vmm::Ec2, "9a8741826bb2511d9d966360a0ea882d443b9787cdfb82b0d88c5ca5dae5ec0106e4022e8bf04a031a86238738e7af1e"),
        (Vmm::Gce, "69bd8f423d1516a87572c602fc91a5cd392de8f88ce99602d8c0059da1e82aad1267d1740ce9acf4c5271cb10f513344"),
    ];
    for (vmm, expected) in some(vmms, 3) {
        assert_eq!(snp(&ovmf, Some(boot()), 3, vcpu(0x21, vmm)).as_deref(), Ok(expected), "{vmm:?}");
    }
    if cfg!(miri) {
        return;
    }
    assert_eq!(
        snp(&ovmf, None, 1, vcpu(1, Vmm::Qemu)).as_deref(),
        Ok("9ce65dfef693942cda0f43744be4d8f88a05741866c1792f3aeca0024e0a6e77af96d868aa8bf908e2265b8095536059")
    );
    assert_eq!(
        hex(&firmware_digest(&ovmf, |_| {}).unwrap().digest()),
        "91cb94ce83ec9cb9a59d1efb975a7991c5b38123f3d825f0d834a836c667f8d47c6dbb5119a16c9a7bbf04317ac5f4d5"
    );
}

#[test]
fn sev_guests_measure_as_the_reference_tool_says() {
    let image = image(&SECTIONS, &[]);
    let ovmf = &Ovmf::parse(&image).unwrap();
    let es = SevGuest { ovmf, boot: Some(boot()), vcpus: Some((2, vcpu(0, Vmm::Qemu))) };
    let digest = es.measure(|_| {}).unwrap();
    assert_eq!(hex(&digest), "fcb51c07d8af173c89c99c8d9ca06948a7c530beeee6210648389de3a5686273");
    let plain = SevGuest { ovmf, boot: Some(BootHashes::new(b"kernel", b"", b"")), vcpus: None };
    let mut loads = Vec::new();
    let digest = plain.measure(|step| loads.push((step.part, step.len))).unwrap();
    assert_eq!(hex(&digest), "45d0cd25b6e3789434cc104805c9a0ec639477fbb0a175d6f544b5327e83ab69");
    assert_eq!(loads, [(Part::Firmware, 8192), (Part::KernelHashes, 176)]);
}

#[test]
fn an_svsm_guest_measures_as_the_reference_tool_says() {
    let (firmware, svsm) = (image(&SECTIONS, &[]), image(&SECTIONS[..3], &entry(&words(&[0x10]), SVSM_INFO)));
    let ovmf = &Ovmf::parse(&firmware).unwrap();
    let svsm = &Ovmf::parse_at(&svsm, svsm_end(ovmf, 4096).unwrap()).unwrap();
    let digest = SvsmGuest { ovmf, svsm, vcpus: 2, signature: 0x80_0f12 }.measure(|_| {}).unwrap();
    assert_eq!(
        hex(&digest.digest()),
        "52c2860de6b4c9196994f08f8444694a8b18912c957fd296d537be7d9f5ca3c7d1218866719c59e9cfd9aeb9f77291fa"
    );
    assert_eq!(svsm_end(ovmf, u64::MAX), Err(OvmfError::Size));
    assert_eq!(ovmf.svsm_entry(), Err(OvmfError::NoSvsmInfo));
}

#[test]
fn guests_without_a_measurement_say_why() {
    let qemu = vcpu(1, Vmm::Qemu);
    let measured = |sections: &[_], boot| {
        let image = image(sections, &[]);
        snp(&Ovmf::parse(&image).unwrap(), boot, 1, qemu).map(|_| ())
    };
    assert_eq!(measured(&[(0, 0x1000, 9)], None), Err(LaunchError::UnknownSection(9)));
    assert_eq!(measured(&[(0, 0x1001, 1)], None), Err(LaunchError::Unaligned));
    assert_eq!(measured(&[], Some(boot())), Err(LaunchError::NoHashTable));
    assert_eq!(measured(&[(0, 0x2000, 0x10)], Some(boot())), Err(LaunchError::HashTableSize));
    assert_eq!(measured(&[(0, 0x2000, 0x10)], None), Ok(()));
    let plain = vec![0; 4096];
    let no_table = Ovmf::parse(&plain).unwrap();
    assert_eq!(snp(&no_table, None, 1, qemu), Err(LaunchError::Ovmf(OvmfError::NoResetBlock)));
    assert_eq!(SevGuest { ovmf: &no_table, boot: None, vcpus: None }.measure(|_| {}).map(|_| ()), Ok(()));
    let kernel = SevGuest { ovmf: &no_table, boot: Some(boot()), vcpus: None };
    assert_eq!(kernel.measure(|_| {}), Err(LaunchError::NoHashTable));
    let odd = vec![0; 4097];
    assert_eq!(firmware_digest(&Ovmf::parse(&odd).unwrap(), |_| {}), Err(LaunchError::Unaligned));
}

#[test]
fn malformed_images_are_refused() {
    let image = image(&SECTIONS, &[]);
    let with = |at: usize, bytes: &[u8]| {
        let mut image = image.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        Ovmf::parse(&image).map(|_| ()).unwrap_err()
    };
    assert_eq!(Ovmf::parse(&[0; 49]), Err(OvmfError::Size));
    assert_eq!(with(4096, b"VESA"), OvmfError::NoMetadata);
    assert_eq!(with(4096 + 8, &[2]), OvmfError::MetadataVersion(2));
    assert_eq!(with(4096 + 12, &[6]), OvmfError::MetadataTruncated);
    let last_entry_len = 8192 - 32 - 18 - 18;
    assert_eq!(with(last_entry_len, &[17, 0]), OvmfError::EntrySize);
    let table_len = 8192 - 32 - 18;
    assert_eq!(with(table_len, &[0xff, 0xff]), OvmfError::Size);
}

#[test]
fn hashes_stay_within_their_page() {
    assert!(boot().page(4096 - BootHashes::TABLE_LEN).is_some());
    assert!(boot().page(4097 - BootHashes::TABLE_LEN).is_none());
    assert!(boot().page(usize::MAX).is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(256)))]

    #[test]
    fn any_change_of_an_image_is_parsed_or_refused(
        changes in prop::collection::vec((prop_oneof![4096usize..4200, 7900usize..8192], any::<u8>()), 0..12),
        cut in 0usize..8192,
    ) {
        let mut image = image(&SECTIONS, &[]);
        changes.into_iter().for_each(|(at, byte)| image[at] = byte);
        for data in [&image[..], &image[cut..]] {
            if let Ok(ovmf) = Ovmf::parse(data) {
                let small = ovmf.sections().iter().all(|section| section.size < 1 << 16);
                if small {
                    let _ = snp(&ovmf, Some(boot()), 2, vcpu(1, Vmm::Ec2));
                }
            }
        }
    }
}
