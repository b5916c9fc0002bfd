//! Verification detects and locates all tampering with a log.

use std::sync::LazyLock;

use proptest::prelude::*;
use spp_log::registry::chip_files;

use super::reference_log::*;
use super::*;

const ROOT: &str = "the root does not match the 600 entries";

#[test]
fn verify_intact_log_has_no_findings() {
    assert_eq!(TamperedLog::mirror().0.path().join("tile/1/000.p/2").metadata().unwrap().len(), 64);
    TamperedLog::mirror().findings().assert_no_more();
    TamperedLog::signed(&REFERENCE.entries).findings().assert_no_more();
    let key = REFERENCE.log.signer.key();
    verify_source(&mut StoreDirectory::new(&REFERENCE.log.dir(), key), None).assert_no_more();
    for size in [0, 1, 255, 256, 257, 599, 600] {
        TamperedLog::mirror().findings_after(&earlier_checkpoint(size)).assert_no_more();
        verify_source(&mut StoreDirectory::new(&REFERENCE.log.dir(), key), Some(&earlier_checkpoint(size)))
            .assert_no_more();
        TamperedLog::signed(&REFERENCE.entries[..size]).findings().assert_no_more();
    }
}

#[test]
fn verify_reports_flipped_bit_in_entry() {
    for (name, tile, first, at) in [
        ("tile/entries/000", "tile/0/000", 0, 0),
        ("tile/entries/001", "tile/0/001", 256, 255),
        ("tile/entries/002.p/88", "tile/0/002.p/88", 512, 40),
    ] {
        let tampered = TamperedLog::mirror().change_entries(name, |entries| {
            let middle = entries[at].len() / 2;
            flip(&mut entries[at], middle);
        });
        let entry = format!("entry {}", first + at);
        let message = format!("the hash does not match {tile}: the entry or the tile was changed");
        let mut found = tampered.findings().expect_finding(&entry, &message).expect_finding("checkpoint", ROOT);
        if at != 40 {
            found = found.expect_finding("tile/1/000.p/2", "the hashes do not match the tiles below");
        }
        assert!(found.0.iter().all(|finding| finding.at == entry), "{found:?}");
    }
}

#[test]
fn verify_reports_flipped_bit_in_leaf_tile() {
    for (tile, first, at) in [("tile/0/000", 0, 0), ("tile/0/001", 256, 100), ("tile/0/002.p/88", 512, 87)] {
        let tampered = TamperedLog::mirror().change(tile, |bytes| flip(bytes, at * 32 + 5));
        let message = format!("the hash does not match {tile}: the entry or the tile was changed");
        tampered.findings().expect_finding(&format!("entry {}", first + at), &message).assert_no_more();
    }
}

#[test]
fn verify_reports_flipped_bit_in_upper_tile() {
    let tampered = TamperedLog::mirror().change("tile/1/000.p/2", |bytes| flip(bytes, 37));
    tampered.findings().expect_finding("tile/1/000.p/2", "the hashes do not match the tiles below").assert_no_more();
}

#[test]
fn verify_reports_flipped_bit_in_checkpoint() {
    let note = fs::read(REFERENCE.mirror.join("checkpoint")).unwrap();
    let text = note.windows(2).position(|two| two == b"\n\n").unwrap();
    for bit in 0..note.len() * 8 {
        let tampered = TamperedLog::with_checkpoint_only(|bytes| bytes[bit / 8] ^= 1 << (bit % 8));
        let findings = tampered.findings().0;
        assert_eq!(findings.len(), 1, "bit {bit}: {findings:?}");
        assert_eq!(findings[0].at, "checkpoint", "bit {bit}");
    }
    let tampered = TamperedLog::mirror().change("checkpoint", |bytes| bytes[text - 46] ^= 1);
    let message = "the signature of log.example/test on the checkpoint does not verify";
    tampered.findings().expect_finding("checkpoint", message).assert_no_more();
    let signature = note.len() - 20;
    let tampered = TamperedLog::mirror().change("checkpoint", |bytes| {
        bytes[signature] = if bytes[signature] == b'A' { b'B' } else { b'A' };
    });
    tampered.findings().expect_finding("checkpoint", message).assert_no_more();
}

impl TamperedLog {
    /// The checkpoint alone: a valid one would lead to findings about the missing files.
    fn with_checkpoint_only(change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let tampered = Self(spp_testkit::files::temp_dir());
        fs::copy(REFERENCE.mirror.join("checkpoint"), tampered.path("checkpoint")).unwrap();
        tampered.change("checkpoint", change)
    }
}

#[test]
fn verify_reports_removed_entry() {
    for (name, at, left) in [("tile/entries/001", 17, 255), ("tile/entries/002.p/88", 87, 87)] {
        let tampered = TamperedLog::mirror().change_entries(name, |entries| drop(entries.remove(at)));
        let message = format!("{left} complete entries found, {} expected", left + 1);
        tampered.findings().expect_finding(name, &message).expect_finding("checkpoint", ROOT);
    }
}

#[test]
fn verify_reports_swapped_entries() {
    for (name, tile, first) in
        [("tile/entries/001", "tile/0/001", 256), ("tile/entries/002.p/88", "tile/0/002.p/88", 512)]
    {
        let tampered = TamperedLog::mirror().change_entries(name, |entries| entries.swap(3, 60));
        let message = format!("entries {}, {} and their hashes are in different order", first + 3, first + 60);
        tampered.findings().expect_finding(tile, &message).expect_finding("checkpoint", ROOT);
        // If the hashes are swapped, too, only the root shows it.
        let mut entries = REFERENCE.entries.clone();
        entries.swap(first + 3, first + 60);
        let tampered = TamperedLog::mirror();
        tampered.write_tiles(&entries);
        tampered.findings().expect_finding("checkpoint", ROOT).assert_no_more();
    }
}

#[test]
fn verify_reports_entry_rewritten_with_its_hashes() {
    for at in [0, 300, 599] {
        let tampered = TamperedLog::mirror();
        tampered.write_tiles(&with_changed_record(at, |record| record.backup[0] ^= 1));
        tampered.findings().expect_finding("checkpoint", ROOT).assert_no_more();
    }
}

#[test]
fn verify_reports_missing_file() {
    for name in
        ["tile/entries/001", "tile/entries/002.p/88", "tile/0/000", "tile/0/002.p/88", "tile/1/000.p/2", "checkpoint"]
    {
        TamperedLog::mirror().without(name).findings().expect_finding(name, "not found");
    }
}

#[test]
fn verify_reports_malformed_entries() {
    for name in ["tile/entries/000", "tile/entries/002.p/88"] {
        for more in [&[0u8][..], &[0, 9, 1], &[0, 0]] {
            let tampered = TamperedLog::mirror().change(name, |bytes| bytes.extend(more));
            let found = tampered.findings();
            assert!(found.0.iter().any(|finding| finding.at == name), "{more:?}: {found:?}");
        }
        let tampered = TamperedLog::mirror().change(name, |bytes| bytes.truncate(bytes.len() - 1));
        tampered.findings().expect_finding(name, "entries are missing or truncated");
    }
    let mut entries = REFERENCE.entries[..3].to_vec();
    entries[1] = b"no record".to_vec();
    TamperedLog::signed(&entries).findings().expect_finding("entry 1", "not a device record").assert_no_more();
}

#[test]
fn verify_with_earlier_checkpoint_reports_fork() {
    let other = with_changed_record(20, |record| record.backup[0] ^= 1);
    let more = (ENTRIES..ENTRIES + 100).map(|n| REFERENCE.manufacturer.record(n).to_bytes().unwrap());
    let longer: Vec<_> = other.iter().cloned().chain(more).collect();
    for (entries, seen) in [(&other, 600), (&longer, 600), (&longer, 256), (&longer, 21)] {
        let tampered = TamperedLog::signed(entries);
        tampered.findings().assert_no_more();
        let message = format!("inconsistent with the earlier checkpoint of {seen} entries");
        tampered.findings_after(&earlier_checkpoint(seen)).expect_finding("checkpoint", &message).assert_no_more();
        tampered.findings_after(&earlier_checkpoint(20)).assert_no_more();
    }
    // The fork's checkpoint with the tiles of the original log.
    let forked = checkpoint_of(&other, &REFERENCE.log.signer);
    TamperedLog::new(&REFERENCE.entries, forked.note()).findings().expect_finding("checkpoint", ROOT).assert_no_more();
}

#[test]
fn verify_with_earlier_checkpoint_reports_old_copy() {
    let tampered = TamperedLog::signed(&REFERENCE.entries[..599]);
    tampered.findings().assert_no_more();
    let message = "the log has 599 entries, an earlier checkpoint 600: entries were removed, or this is an old copy";
    tampered.findings_after(&earlier_checkpoint(600)).expect_finding("checkpoint", message).assert_no_more();
}

#[test]
fn verify_reports_checkpoint_of_other_key_or_log() {
    let same_name = LocalSigner::new(ORIGIN);
    let tampered = TamperedLog::new(&REFERENCE.entries, checkpoint_of(&REFERENCE.entries, &same_name).note());
    let message = "the checkpoint is not signed by the log key of log.example/test";
    tampered.findings().expect_finding("checkpoint", message).assert_no_more();
    let foreign = LocalSigner::new("log.example/other");
    let note = checkpoint_of(&REFERENCE.entries, &foreign).note().to_vec();
    let message = "the checkpoint is of log log.example/other, expected log.example/test";
    TamperedLog::new(&REFERENCE.entries, &note).findings().expect_finding("checkpoint", message).assert_no_more();
    TamperedLog::mirror().findings_after(&note).expect_finding("earlier checkpoint", message).assert_no_more();
}

#[test]
fn verify_reports_certificate_of_other_issuer() {
    let flipped = with_changed_record(7, |record| {
        let last = record.certificate.len() - 1;
        record.certificate[last] ^= 1;
    });
    TamperedLog::signed(&flipped).findings().expect_finding("entry 7", "certificate, signature:").assert_no_more();
    let forger = Manufacturer::new();
    let of_the_forger = with_changed_record(8, |record| *record = forger.record(8));
    TamperedLog::signed(&of_the_forger)
        .findings()
        .expect_finding("entry 8", "certificate, signature:")
        .assert_no_more();
}

#[test]
fn verify_reports_record_that_differs_from_certificate() {
    let stranger = REFERENCE.manufacturer.record(9_000);
    let (at, others) = ("entry 299", &stranger);
    for (entries, message) in [
        (with_changed_record(299, |record| record.chip = others.chip.clone()), "certificate, signature:"),
        (
            with_changed_record(299, |record| record.identity = others.identity.clone()),
            "certificate, identity: differs from the record",
        ),
        (
            with_changed_record(299, |record| record.serial = others.serial.clone()),
            "certificate, serial-number: differs from the record",
        ),
        (
            with_changed_record(299, |record| record.public_key = others.public_key.clone()),
            "certificate, public-key: differs from the record",
        ),
        (
            with_changed_record(299, |record| record.public_key = None),
            "certificate, public-key: differs from the record",
        ),
        (with_changed_record(299, |record| record.certificate_is_cwt = true), "certificate, signature:"),
    ] {
        TamperedLog::signed(&entries).findings().expect_finding(at, message).assert_no_more();
    }
}

#[test]
fn verify_reports_duplicates_with_both_entries() {
    let first = DeviceRecord::from_bytes(&REFERENCE.entries[3]).unwrap();
    for what in ["chip ID", "identity", "certificate serial", "public key", "session"] {
        let entries = with_changed_record(520, |record| match what {
            "chip ID" => record.chip = first.chip.clone(),
            "identity" => record.identity = first.identity.clone(),
            "certificate serial" => record.serial = first.serial.clone(),
            "public key" => record.public_key = first.public_key.clone(),
            _ => record.session = first.session,
        });
        let found = TamperedLog::signed(&entries)
            .findings()
            .expect_finding("entry 520", &format!("duplicate {what}: also in entry 3"));
        assert_eq!(found.0.len(), usize::from(what != "session"), "the record differs from its certificate, too");
    }
    let twice = with_changed_record(521, |record| *record = first.clone());
    let found = TamperedLog::signed(&twice).findings();
    assert_eq!(found.0.len(), 6, "the subject, too");
    assert!(found.0.iter().all(|finding| finding.at == "entry 521"));
}

#[test]
fn verify_reports_damage_in_daemon_directory() {
    let key = REFERENCE.log.signer.key();
    let damaged = |name: &str, change: fn(&mut Vec<u8>)| {
        let dir = spp_testkit::files::temp_dir();
        copy_directory(&REFERENCE.log.dir().join("tile"), &dir.path().join("tile"));
        copy_directory(&REFERENCE.log.dir().join("edge"), &dir.path().join("edge"));
        let tampered = TamperedLog(dir).change(name, change);
        (verify_source(&mut StoreDirectory::new(tampered.0.path(), key), None), tampered)
    };
    let (found, _) = damaged("tile/entries/001", |bytes| flip(bytes, 1000));
    found.expect_finding("checkpoint", ROOT);
    let (found, _) = damaged("tile/0/001", |bytes| flip(bytes, 40));
    assert!(!found.0.is_empty());
    let edge = "edge/00000000000000000512";
    let (found, _) = damaged(edge, |bytes| flip(bytes, 2000));
    found.expect_finding("checkpoint", "the batch at byte 0 is damaged, and valid batches follow it").assert_no_more();
    // A damaged last batch looks like one that a crash truncated. Only an earlier checkpoint shows the difference.
    let (found_without, tampered) = damaged(edge, |bytes| {
        let last = bytes.len() - 9;
        flip(bytes, last);
    });
    found_without.assert_no_more();
    let found_with = super::reference_log::verify_source(
        &mut StoreDirectory::new(tampered.0.path(), key),
        Some(&earlier_checkpoint(600)),
    );
    found_with.expect_finding("checkpoint", "an earlier checkpoint 600").assert_no_more();
}

/// A smaller log, for many fast cases.
static SMALL: LazyLock<TamperedLog> = LazyLock::new(|| TamperedLog::signed(&REFERENCE.entries[..260]));

proptest! {
    #![proptest_config(spp_testkit::random::cases(60, 1_500))]

    #[test]
    fn verify_detects_any_flipped_bit(file in 0usize..6, place in 0.0f64..1.0, bit in 0u8..8) {
        let names = ["tile/entries/000", "tile/entries/001.p/4", "tile/0/000", "tile/0/001.p/4", "tile/1/000.p/1", "checkpoint"];
        let copy = spp_testkit::files::temp_dir();
        copy_directory(SMALL.0.path(), copy.path());
        prop_assert_eq!(files_of(copy.path()).len(), names.len());
        let tampered = TamperedLog(copy).change(names[file], |bytes| {
            let at = (bytes.len() as f64 * place) as usize;
            bytes[at] ^= 1 << bit;
        });
        prop_assert!(!tampered.findings().0.is_empty());
    }
}

#[test]
fn verify_reports_missing_or_changed_chip_files() {
    let tampered = TamperedLog::mirror();
    copy_directory(&REFERENCE.mirror.join("chip"), &tampered.path("chip"));
    tampered.findings().assert_no_more();
    let chip = |n: usize| DeviceRecord::from_bytes(&REFERENCE.entries[n]).unwrap().chip;
    let (record, proof) = (|n| chip_files(&chip(n)).0, |n| chip_files(&chip(n)).1);
    let at = |n| format!("files of chip {}", chip(n));
    let tampered = tampered.without(&record(3)).change(&record(500), |bytes| flip(bytes, 100)).without(&proof(9));
    fs::copy(tampered.path(&proof(7)), tampered.path(&proof(9))).unwrap();
    fs::copy(tampered.path(&proof(7)), tampered.path(&proof(11))).unwrap();
    fs::copy(tampered.path(&record(7)), tampered.path(&record(11))).unwrap();
    let moved = "the proof of the entry does not verify";
    let found = tampered
        .findings()
        .expect_finding(&at(3), "not found")
        .expect_finding(&at(500), "the record differs from entry 500");
    found
        .expect_finding(&at(9), moved)
        .expect_finding(&at(11), "the record differs from entry 11")
        .expect_finding(&at(11), moved)
        .assert_no_more();
}
