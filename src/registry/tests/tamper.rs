//! Whatever somebody does to a log that he has in his hands is found by whoever walks it, and named.

use std::sync::LazyLock;

use proptest::prelude::*;

use super::super::export::chip_files;
use super::real::*;
use super::*;

const ROOT: &str = "its root is not that of the 600 entries";

#[test]
fn an_honest_log_has_no_findings_in_a_mirror_and_in_the_daemons_own_directory() {
    assert_eq!(Shown::mirror().0.path().join("tile/1/000.p/2").metadata().unwrap().len(), 64);
    Shown::mirror().found().and_nothing_else();
    Shown::signed(&REAL.entries).found().and_nothing_else();
    let key = REAL.log.signer.key();
    found(&mut StoreDirectory::new(&REAL.log.dir(), key), None).and_nothing_else();
    for size in [0, 1, 255, 256, 257, 599, 600] {
        Shown::mirror().found_after(&earlier(size)).and_nothing_else();
        found(&mut StoreDirectory::new(&REAL.log.dir(), key), Some(&earlier(size))).and_nothing_else();
        Shown::signed(&REAL.entries[..size]).found().and_nothing_else();
    }
}

#[test]
fn a_flipped_bit_in_an_entry_is_named() {
    for (name, tile, first, at) in [
        ("tile/entries/000", "tile/0/000", 0, 0),
        ("tile/entries/001", "tile/0/001", 256, 255),
        ("tile/entries/002.p/88", "tile/0/002.p/88", 512, 40),
    ] {
        let shown = Shown::mirror().change_entries(name, |entries| {
            let middle = entries[at].len() / 2;
            flip(&mut entries[at], middle);
        });
        let entry = format!("entry {}", first + at);
        let words = format!("its hash is not the one in {tile}: one of them was changed");
        let mut found = shown.found().has(&entry, &words).has("checkpoint", ROOT);
        if at != 40 {
            found = found.has("tile/1/000.p/2", "its hashes are not those of the tiles below it");
        }
        assert!(found.0.iter().all(|finding| finding.at == entry), "{found:?}");
    }
}

#[test]
fn a_flipped_bit_in_a_tile_of_leaves_is_named() {
    for (tile, first, at) in [("tile/0/000", 0, 0), ("tile/0/001", 256, 100), ("tile/0/002.p/88", 512, 87)] {
        let shown = Shown::mirror().change(tile, |bytes| flip(bytes, at * 32 + 5));
        let words = format!("its hash is not the one in {tile}: one of them was changed");
        shown.found().has(&format!("entry {}", first + at), &words).and_nothing_else();
    }
}

#[test]
fn a_flipped_bit_in_an_upper_tile_is_named() {
    let shown = Shown::mirror().change("tile/1/000.p/2", |bytes| flip(bytes, 37));
    shown.found().has("tile/1/000.p/2", "its hashes are not those of the tiles below it").and_nothing_else();
}

#[test]
fn any_flipped_bit_in_the_checkpoint_is_named() {
    let note = fs::read(REAL.mirror.join("checkpoint")).unwrap();
    let text = note.windows(2).position(|two| two == b"\n\n").unwrap();
    for bit in 0..note.len() * 8 {
        let shown = Shown::mirror_checkpoint_only(|bytes| bytes[bit / 8] ^= 1 << (bit % 8));
        let findings = shown.found().0;
        assert_eq!(findings.len(), 1, "bit {bit}: {findings:?}");
        assert_eq!(findings[0].at, "checkpoint", "bit {bit}");
    }
    let shown = Shown::mirror().change("checkpoint", |bytes| bytes[text - 46] ^= 1);
    let words = "the signature of log.example/test on the checkpoint does not verify";
    shown.found().has("checkpoint", words).and_nothing_else();
    let signature = note.len() - 20;
    let shown = Shown::mirror().change("checkpoint", |bytes| {
        bytes[signature] = if bytes[signature] == b'A' { b'B' } else { b'A' };
    });
    shown.found().has("checkpoint", words).and_nothing_else();
}

impl Shown {
    /// Only the checkpoint: with a good one, everything else would be missed.
    fn mirror_checkpoint_only(change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let shown = Self(spp_testkit::files::temp_dir());
        fs::copy(REAL.mirror.join("checkpoint"), shown.path("checkpoint")).unwrap();
        shown.change("checkpoint", change)
    }
}

#[test]
fn a_removed_entry_is_named() {
    for (name, at, left) in [("tile/entries/001", 17, 255), ("tile/entries/002.p/88", 87, 87)] {
        let shown = Shown::mirror().change_entries(name, |entries| drop(entries.remove(at)));
        let words = format!("it has {left} whole entries and should have {}", left + 1);
        shown.found().has(name, &words).has("checkpoint", ROOT);
    }
}

#[test]
fn swapped_entries_are_named() {
    for (name, tile, first) in
        [("tile/entries/001", "tile/0/001", 256), ("tile/entries/002.p/88", "tile/0/002.p/88", 512)]
    {
        let shown = Shown::mirror().change_entries(name, |entries| entries.swap(3, 60));
        let words = format!("the entries {}, {} are in another order than their hashes", first + 3, first + 60);
        shown.found().has(tile, &words).has("checkpoint", ROOT);
        // With their hashes, too, only the root tells.
        let mut entries = REAL.entries.clone();
        entries.swap(first + 3, first + 60);
        let shown = Shown::mirror();
        shown.show(&entries);
        shown.found().has("checkpoint", ROOT).and_nothing_else();
    }
}

#[test]
fn an_entry_that_was_rewritten_with_all_its_hashes_is_told_by_the_root() {
    for at in [0, 300, 599] {
        let shown = Shown::mirror();
        shown.show(&with(at, |record| record.backup[0] ^= 1));
        shown.found().has("checkpoint", ROOT).and_nothing_else();
    }
}

#[test]
fn a_missing_file_is_named() {
    for name in
        ["tile/entries/001", "tile/entries/002.p/88", "tile/0/000", "tile/0/002.p/88", "tile/1/000.p/2", "checkpoint"]
    {
        Shown::mirror().without(name).found().has(name, "is not there");
    }
}

#[test]
fn bytes_that_are_no_entry_are_named() {
    for name in ["tile/entries/000", "tile/entries/002.p/88"] {
        for more in [&[0u8][..], &[0, 9, 1], &[0, 0]] {
            let shown = Shown::mirror().change(name, |bytes| bytes.extend(more));
            let found = shown.found();
            assert!(found.0.iter().any(|finding| finding.at == name), "{more:?}: {found:?}");
        }
        let shown = Shown::mirror().change(name, |bytes| bytes.truncate(bytes.len() - 1));
        shown.found().has(name, "entries are missing or cut off");
    }
    let mut entries = REAL.entries[..3].to_vec();
    entries[1] = b"no record".to_vec();
    Shown::signed(&entries).found().has("entry 1", "not a device record").and_nothing_else();
}

#[test]
fn a_log_with_two_faces_is_told_by_whoever_has_seen_the_other_one() {
    let other = with(20, |record| record.backup[0] ^= 1);
    let more = (ENTRIES..ENTRIES + 100).map(|n| REAL.manufacturer.record(n).to_bytes().unwrap());
    let longer: Vec<_> = other.iter().cloned().chain(more).collect();
    for (entries, seen) in [(&other, 600), (&longer, 600), (&longer, 256), (&longer, 21)] {
        let shown = Shown::signed(entries);
        shown.found().and_nothing_else();
        let words = format!("it does not continue the checkpoint of {seen} entries that was seen before");
        shown.found_after(&earlier(seen)).has("checkpoint", &words).and_nothing_else();
        shown.found_after(&earlier(20)).and_nothing_else();
    }
    // The other face's checkpoint on this one's tiles.
    let forked = checkpoint_of(&other, &REAL.log.signer);
    Shown::made_of(&REAL.entries, forked.note()).found().has("checkpoint", ROOT).and_nothing_else();
}

#[test]
fn an_old_copy_is_told_by_whoever_has_seen_more() {
    let shown = Shown::signed(&REAL.entries[..599]);
    shown.found().and_nothing_else();
    let words = "it has 599 entries, and 600 were seen before: entries were removed, or an old copy is shown";
    shown.found_after(&earlier(600)).has("checkpoint", words).and_nothing_else();
}

#[test]
fn a_checkpoint_of_another_key_or_another_log_is_told() {
    let same_name = LocalSigner::new(ORIGIN);
    let shown = Shown::made_of(&REAL.entries, checkpoint_of(&REAL.entries, &same_name).note());
    let words = "the checkpoint is not signed by the log key of log.example/test";
    shown.found().has("checkpoint", words).and_nothing_else();
    let foreign = LocalSigner::new("log.example/other");
    let note = checkpoint_of(&REAL.entries, &foreign).note().to_vec();
    let words = "the checkpoint is of the log log.example/other, not of log.example/test";
    Shown::made_of(&REAL.entries, &note).found().has("checkpoint", words).and_nothing_else();
    Shown::mirror().found_after(&note).has("the checkpoint that was seen before", words).and_nothing_else();
}

#[test]
fn a_certificate_that_the_manufacturer_did_not_sign_is_named() {
    let flipped = with(7, |record| {
        let last = record.certificate.len() - 1;
        record.certificate[last] ^= 1;
    });
    Shown::signed(&flipped).found().has("entry 7", "certificate, signature:").and_nothing_else();
    let forger = Manufacturer::new();
    let of_the_forger = with(8, |record| *record = forger.record(8));
    Shown::signed(&of_the_forger).found().has("entry 8", "certificate, signature:").and_nothing_else();
}

#[test]
fn a_record_that_says_something_else_than_its_certificate_is_named() {
    let stranger = REAL.manufacturer.record(9_000);
    let (at, others) = ("entry 299", &stranger);
    for (entries, words) in [
        (with(299, |record| record.chip = others.chip.clone()), "certificate, signature:"),
        (
            with(299, |record| record.identity = others.identity.clone()),
            "certificate, identity: it is not the record's",
        ),
        (
            with(299, |record| record.serial = others.serial.clone()),
            "certificate, serial-number: it is not the record's",
        ),
        (
            with(299, |record| record.public_key = others.public_key.clone()),
            "certificate, public-key: it is not the record's",
        ),
        (with(299, |record| record.public_key = None), "certificate, public-key: it is not the record's"),
        (with(299, |record| record.certificate_is_cwt = true), "certificate, signature:"),
    ] {
        Shown::signed(&entries).found().has(at, words).and_nothing_else();
    }
}

#[test]
fn what_is_there_twice_is_named_with_both_places() {
    let first = DeviceRecord::from_bytes(&REAL.entries[3]).unwrap();
    for what in ["chip ID", "identity", "certificate serial", "public key", "session"] {
        let entries = with(520, |record| match what {
            "chip ID" => record.chip = first.chip.clone(),
            "identity" => record.identity = first.identity.clone(),
            "certificate serial" => record.serial = first.serial.clone(),
            "public key" => record.public_key = first.public_key.clone(),
            _ => record.session = first.session,
        });
        let found = Shown::signed(&entries).found().has("entry 520", &format!("its {what} is that of entry 3 already"));
        assert_eq!(found.0.len(), usize::from(what != "session"), "its certificate says something else, too");
    }
    let twice = with(521, |record| *record = first.clone());
    let found = Shown::signed(&twice).found();
    assert_eq!(found.0.len(), 5);
    assert!(found.0.iter().all(|finding| finding.at == "entry 521"));
}

#[test]
fn damage_in_the_daemons_own_directory_is_named() {
    let key = REAL.log.signer.key();
    let damaged = |name: &str, change: fn(&mut Vec<u8>)| {
        let dir = spp_testkit::files::temp_dir();
        copy_directory(&REAL.log.dir().join("tile"), &dir.path().join("tile"));
        copy_directory(&REAL.log.dir().join("edge"), &dir.path().join("edge"));
        let shown = Shown(dir).change(name, change);
        (found(&mut StoreDirectory::new(shown.0.path(), key), None), shown)
    };
    let (found, _) = damaged("tile/entries/001", |bytes| flip(bytes, 1000));
    found.has("checkpoint", ROOT);
    let (found, _) = damaged("tile/0/001", |bytes| flip(bytes, 40));
    assert!(!found.0.is_empty());
    let edge = "edge/00000000000000000512";
    let (found, _) = damaged(edge, |bytes| flip(bytes, 2000));
    found.has("checkpoint", "the batch at byte 0 is damaged, and others follow it").and_nothing_else();
    // The last batch is like one that a crash cut off: only whoever has seen more can tell.
    let (found_without, shown) = damaged(edge, |bytes| {
        let last = bytes.len() - 9;
        flip(bytes, last);
    });
    found_without.and_nothing_else();
    let found_with = super::tamper::found(&mut StoreDirectory::new(shown.0.path(), key), Some(&earlier(600)));
    found_with.has("checkpoint", "and 600 were seen before").and_nothing_else();
}

/// A smaller log, so that many cases are walked in little time.
static SMALL: LazyLock<Shown> = LazyLock::new(|| Shown::signed(&REAL.entries[..260]));

proptest! {
    #![proptest_config(spp_testkit::random::cases(60, 10_000))]

    #[test]
    fn no_single_bit_can_be_flipped_unnoticed(file in 0usize..6, place in 0.0f64..1.0, bit in 0u8..8) {
        let names = ["tile/entries/000", "tile/entries/001.p/4", "tile/0/000", "tile/0/001.p/4", "tile/1/000.p/1", "checkpoint"];
        let copy = spp_testkit::files::temp_dir();
        copy_directory(SMALL.0.path(), copy.path());
        prop_assert_eq!(files_of(copy.path()).len(), names.len());
        let shown = Shown(copy).change(names[file], |bytes| {
            let at = (bytes.len() as f64 * place) as usize;
            bytes[at] ^= 1 << bit;
        });
        prop_assert!(!shown.found().0.is_empty());
    }
}

#[test]
fn files_of_a_chip_that_are_missing_or_changed_or_anothers_are_named() {
    let shown = Shown::mirror();
    copy_directory(&REAL.mirror.join("chip"), &shown.path("chip"));
    shown.found().and_nothing_else();
    let chip = |n: usize| DeviceRecord::from_bytes(&REAL.entries[n]).unwrap().chip;
    let (record, proof) = (|n| chip_files(&chip(n)).0, |n| chip_files(&chip(n)).1);
    let at = |n| format!("the files of chip {}", chip(n));
    let shown = shown.without(&record(3)).change(&record(500), |bytes| flip(bytes, 100)).without(&proof(9));
    fs::copy(shown.path(&proof(7)), shown.path(&proof(9))).unwrap();
    fs::copy(shown.path(&proof(7)), shown.path(&proof(11))).unwrap();
    fs::copy(shown.path(&record(7)), shown.path(&record(11))).unwrap();
    let moved = "does not lead from the entry to the root";
    let found = shown.found().has(&at(3), "is not there").has(&at(500), "the record is not entry 500");
    found.has(&at(9), moved).has(&at(11), "the record is not entry 11").has(&at(11), moved).and_nothing_else();
}
