//! Files made by hand; those of other tools, with the digests that these measure, are in gmem-cli's tests.

use alloc::vec;
use alloc::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::effort::cases;

const SNP: u32 = 1;
const TDX: u32 = 2;
const ES: u32 = 4;
const SEV: u32 = 8;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn header(kind: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap();
    let padding = vec![0; body.len().next_multiple_of(8) - body.len()];
    [words(&[kind, length]), body.to_vec(), padding].concat()
}

fn platform(mask: u32, kind: Platform) -> Vec<u8> {
    header(SUPPORTED_PLATFORM, &words(&[mask, u32::from_le_bytes([0, kind as u8, 1, 0]), 0, 0]))
}

fn page_data(gpa: u32, mask: u32, offset: u32, flags: u32, kind: u32) -> Vec<u8> {
    header(PAGE_DATA, &words(&[gpa, 0, mask, offset, flags, kind]))
}

fn area(index: u32, size: u32) -> Vec<u8> {
    header(PARAMETER_AREA, &words(&[size, 0, index, 0]))
}

fn insert(index: u32, gpa: u32, mask: u32) -> Vec<u8> {
    header(PARAMETER_INSERT, &words(&[gpa, 0, mask, index]))
}

fn vp_context(mask: u32, offset: u32) -> Vec<u8> {
    header(VP_CONTEXT, &words(&[0xffff_f000, 0xffff, mask, offset, 0]))
}

/// Where the data of [`file`] begins; a page of bytes 1, and one of bytes 2.
const DATA: u32 = 4096;

fn file(headers: &[Vec<u8>]) -> Vec<u8> {
    let platforms = [(SNP, Platform::SevSnp), (TDX, Platform::Tdx), (ES, Platform::SevEs), (SEV, Platform::Sev)];
    let platforms = platforms.map(|(mask, kind)| platform(mask, kind));
    let headers = [platforms.concat(), headers.concat()].concat();
    let size = u32::try_from(headers.len()).unwrap();
    let fixed = [b"IGVM".to_vec(), words(&[1, 24, size, DATA + 8192, 0])].concat();
    let mut file = [fixed, headers].concat();
    file.resize(DATA as usize, 0);
    file.extend([[1; PAGE], [2; PAGE]].concat());
    seal(file)
}

/// With the checksum that the parser computes.
fn seal(mut file: Vec<u8>) -> Vec<u8> {
    if let Err(IgvmError::Checksum(_, computed)) = Igvm::parse(&file) {
        file[20..24].copy_from_slice(&computed.to_le_bytes());
    }
    file
}

fn snp(headers: &[Vec<u8>]) -> Result<[u8; 48], IgvmError> {
    let file = file(headers);
    let mut last = [0; 48];
    let digest = Igvm::parse(&file)?.measure_snp(ZeroPages::Data, |step| last = step.digest.digest())?;
    assert_eq!(digest.digest(), last);
    Ok(last)
}

/// The digest of pages as type, address and contents.
fn expected(pages: &[(PageType, u64, &[u8])]) -> [u8; 48] {
    let mut digest = SnpDigest::new();
    pages.iter().for_each(|(kind, gpa, bytes)| digest.update(PageInfo::new(*kind, *gpa), bytes));
    digest.digest()
}

#[test]
fn the_checksum_is_the_usual_crc_32() {
    assert_eq!(checksum(&[], b"123456789"), 0xcbf4_3926);
}

#[test]
fn directives_load_what_the_format_says() {
    let headers = [
        header(0x101, &[0; 16]),
        area(7, 0x2000),
        page_data(0x1000, SNP, DATA, 0, 0),
        page_data(0x9000, TDX, DATA, 0, 0),
        page_data(0x2000, SNP | TDX, DATA, 2, 0),
        page_data(0x3000, SNP, 0, 0, 0),
        page_data(0x4000, SNP, 0, 0, 1),
        page_data(0x5000, SNP, DATA, 0, 2),
        page_data(0x6000, SNP, DATA, 4, 0),
        insert(7, 0x7000, SNP),
        header(0x307, &[0; 8]),
        header(OPTIONAL | 0x3ff, &[1, 2, 3]),
        vp_context(SNP | ES | SEV, DATA + 4096),
    ];
    let (ones, twos) = ([1; PAGE], [2; PAGE]);
    let pages = [
        (PageType::Normal, 0x1000, &ones[..]),
        (PageType::Unmeasured, 0x2000, &ones),
        (PageType::Normal, 0x3000, &[]),
        (PageType::Secrets, 0x4000, &[]),
        (PageType::Cpuid, 0x5000, &[]),
        (PageType::Unmeasured, 0x7000, &[]),
        (PageType::Unmeasured, 0x8000, &[]),
        (PageType::Vmsa, 0xffff_ffff_f000, &twos),
    ];
    assert_eq!(snp(&headers), Ok(expected(&pages)));
    let mut native = pages;
    native[2].0 = PageType::Zero;
    let file = file(&headers);
    let igvm = Igvm::parse(&file).unwrap();
    assert_eq!(igvm.measure_snp(ZeroPages::Native, |_| {}).unwrap().digest(), expected(&native));
    // Of the directives, one is for SEV-ES and none for SEV; TDX has two pages and knows no VP context.
    let mut sizes = Vec::new();
    igvm.measure_sev(true, |step| sizes.push(step.len)).unwrap();
    assert_eq!(sizes, [PAGE]);
    assert_eq!(igvm.measure_sev(false, |_| {}), Ok(SevDigest::new().digest()));
    let mut mrtd = Mrtd::new();
    mrtd.page(0x9000, Some(&ones));
    mrtd.page_add(0x2000);
    assert_eq!(igvm.measure_tdx(&mut |_| {}), Ok(mrtd.digest()));
}

#[test]
fn a_large_page_is_512_pages() {
    assert_eq!(snp(&[page_data(0x20_0000, SNP, DATA, 1, 0)]), Err(IgvmError::Truncated));
    // A minute for Miri: 512 times the descriptor of a page.
    if cfg!(miri) {
        return;
    }
    let large = snp(&[page_data(0x20_0000, SNP, 0, 1, 0)]);
    let mut digest = SnpDigest::new();
    (0..512).for_each(|page| digest.update(PageInfo::new(PageType::Normal, 0x20_0000 + page * 0x1000), &[]));
    assert_eq!(large, Ok(digest.digest()));
}

#[test]
fn the_digest_of_an_id_block_is_found() {
    let block = [words(&[SNP, 0]), vec![0xab; 48], vec![0; 0x300]].concat();
    let file = file(&[header(SNP_ID_BLOCK, &block)]);
    assert_eq!(Igvm::parse(&file).unwrap().id_block_digest(), Some([0xab; 48]));
}

#[test]
fn what_is_wrong_with_a_file_has_a_name() {
    let parsed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut file = file(&[]);
        change(&mut file);
        Igvm::parse(&file).map(|_| ())
    };
    assert_eq!(parsed(&|_| ()), Ok(()));
    assert_eq!(Igvm::parse(&[]), Err(IgvmError::Magic));
    assert_eq!(Igvm::parse(b"IGVM"), Err(IgvmError::Truncated));
    assert_eq!(parsed(&|file| file[4] = 3), Err(IgvmError::Version(3)));
    assert_eq!(parsed(&|file| file.push(0)), Err(IgvmError::Truncated));
    assert_eq!(parsed(&|file| file[8] = 16), Err(IgvmError::Truncated));
    assert!(matches!(parsed(&|file| file[24] ^= 1), Err(IgvmError::Checksum(..))));
    assert_eq!(machine(1, 4096), Err(IgvmError::Machine(1)));
    assert_eq!(machine(0, 1 << 16), Err(IgvmError::Machine(1 << 16)));
    let none = seal([b"IGVM".to_vec(), words(&[1, 24, 0, 24, 0])].concat());
    let none = Igvm::parse(&none).unwrap();
    assert_eq!(none.measure_tdx(&mut |_| {}), Err(IgvmError::NotFor(Platform::Tdx)));
    for (headers, error) in [
        (vec![header(0x3ff, &[])], IgvmError::Header(0x3ff)),
        (vec![header(PAGE_DATA, &[0; 20])], IgvmError::Header(PAGE_DATA)),
        (vec![page_data(0x1001, SNP, 0, 0, 0)], IgvmError::Unaligned(0x1001)),
        (vec![page_data(0x1000, SNP, 0, 1, 0)], IgvmError::Unaligned(0x1000)),
        (vec![page_data(0x1000, SNP, 0, 0, 9)], IgvmError::PageType(9)),
        (vec![page_data(0x1000, SNP, u32::MAX, 0, 0)], IgvmError::Truncated),
        (vec![insert(1, 0, SNP)], IgvmError::ParameterArea(1)),
        (vec![area(1, 4096), insert(1, 0, SNP), insert(1, 0, SNP)], IgvmError::ParameterArea(1)),
        (vec![area(1, 4095), insert(1, 0, SNP)], IgvmError::Unaligned(4095)),
        (vec![area(1, 0xffff_f000), area(2, 0x2000), insert(1, 0, SNP), insert(2, 0, SNP)], IgvmError::TooLarge),
    ] {
        assert_eq!(snp(&headers), Err(error));
    }
    let context = file(&[vp_context(TDX, DATA)]);
    assert_eq!(Igvm::parse(&context).unwrap().measure_tdx(&mut |_| {}), Err(IgvmError::VpContext));
    let secrets = file(&[page_data(0, ES, 0, 0, 1)]);
    assert_eq!(Igvm::parse(&secrets).unwrap().measure_sev(true, |_| {}), Err(IgvmError::PageType(1)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(256)))]

    #[test]
    fn any_change_of_a_file_is_measured_or_refused(
        changes in prop::collection::vec((0usize..400, any::<u8>()), 0..6),
        cut in 0usize..12288,
    ) {
        let headers = [area(7, 0x2000), page_data(0x1000, SNP, DATA, 0, 0), insert(7, 0x7000, SNP), vp_context(SNP, DATA)];
        let mut file = file(&headers);
        changes.into_iter().for_each(|(at, byte)| file[at] = byte);
        for file in [seal(file.clone()), file[cut..].to_vec()] {
            let Ok(igvm) = Igvm::parse(&file) else { continue };
            if igvm.memory(Platform::SevSnp).is_ok_and(|memory| memory < 1 << 20) {
                let _ = igvm.measure_snp(ZeroPages::Data, |_| {});
            }
        }
    }
}
