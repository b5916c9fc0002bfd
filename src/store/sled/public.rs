//! The public database on sled. There is no way here to change or remove a record.
//!
//! | key | value |
//! |---|---|
//! | `r` + index, 8 octets | the record's octets |
//! | `c` + chip ID, `i` + identity, `e` + session ID | index |
//! | `t` + SHA-256 of the serial number, `k` + SHA-256 of the public key | index |
//! | `n` | how many records there are |

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;

use super::SledOptions;
use super::committer::Committer;
use super::engine::Kind;
use super::place::{Door, System};
use super::view::View;
use crate::keys::sha256;
use crate::names::{ChipId, DeviceIdentity};
use crate::store::{DeviceRecord, PublicDatabase, Publication, PublishError, StoreError, Taken};

static KIND: Kind = Kind { name: "public database", marker: "public", format: 1, found, check };

/// The permanent public database, embedded.
///
/// Trust: whoever controls its directory can withhold records.
pub struct SledPublicDatabase(Committer);

impl SledPublicDatabase {
    /// Makes a new, empty database and opens it. [`StoreError::Place`] where anything is already. For
    /// `sppctl init`.
    pub fn create(dir: &Path, options: &SledOptions) -> Result<Self, StoreError> {
        Committer::create(&KIND, dir, options, Arc::new(System)).map(Self)
    }

    /// Opens an existing database; [`StoreError::Place`] if there is none, or one of another kind, or if another process has it (a
    /// killed predecessor's lock is awaited for some seconds). Never makes one. Calls need a tokio runtime with a timer.
    pub fn open(dir: &Path, options: &SledOptions) -> Result<Self, StoreError> {
        Self::open_through(dir, options, Arc::new(System))
    }

    pub(super) fn open_through(dir: &Path, options: &SledOptions, door: Arc<dyn Door>) -> Result<Self, StoreError> {
        Committer::open(&KIND, dir, options, door).map(Self)
    }
}

fn found(view: &mut View<'_>) -> Result<(), StoreError> {
    view.put(LEN, &0u64)
}

fn check(view: &View<'_>) -> Result<(), StoreError> {
    match len(view)?.checked_sub(1) {
        Some(last) => record(view, last).map(drop),
        None => Ok(()),
    }
}

#[async_trait]
impl PublicDatabase for SledPublicDatabase {
    async fn publish(&self, record: &DeviceRecord) -> Result<Publication, PublishError> {
        let octets = record.to_bytes()?;
        let record = record.clone();
        self.0.run("publishing", move |view| publish(view, &record, &octets)).await
    }

    async fn find_by_chip(&self, chip: &ChipId) -> Result<Option<(DeviceRecord, Vec<u8>, Publication)>, StoreError> {
        let key = chip_key(chip);
        self.0.run("reading a chip's record", move |view| find(view, &key)).await
    }

    async fn find_by_identity(
        &self,
        identity: &DeviceIdentity,
    ) -> Result<Option<(DeviceRecord, Publication)>, StoreError> {
        let key = identity_key(identity);
        let found = self.0.run("reading an identity's record", move |view| find(view, &key)).await?;
        Ok(found.map(|(record, _, publication)| (record, publication)))
    }

    async fn find_by_public_key(&self, spki: &[u8]) -> Result<Option<(DeviceRecord, Publication)>, StoreError> {
        let key = public_key_key(spki);
        let found = self.0.run("reading a public key's record", move |view| find(view, &key)).await?;
        Ok(found.map(|(record, _, publication)| (record, publication)))
    }

    async fn newest(&self) -> Result<Option<(DeviceRecord, Publication)>, StoreError> {
        let newest = |view: &mut View<'_>| len(view)?.checked_sub(1).map(|last| record(view, last)).transpose();
        let found = self.0.run("reading the newest record", newest).await?;
        Ok(found.map(|(record, _, publication)| (record, publication)))
    }

    async fn len(&self) -> Result<u64, StoreError> {
        self.0.run("counting records", |view| len(view)).await
    }
}

fn publish(view: &mut View<'_>, new: &DeviceRecord, octets: &[u8]) -> Result<Publication, PublishError> {
    let uniques = uniques(new);
    for (what, key) in &uniques {
        if let Some(index) = index(view, key)? {
            let (known, _, publication) = record(view, index)?;
            return match known.session == new.session && is_same_but_for_its_time(&known, new) {
                true => Ok(publication),
                false => Err(PublishError::Taken(Taken { what, index, session: known.session })),
            };
        }
    }
    view.admit_new_device()?;
    let index = len(view)?;
    view.put_octets(&record_key(index), octets)?;
    for (_, key) in &uniques {
        view.put_octets(key, &index.to_be_bytes())?;
    }
    view.put(LEN, &(index + 1))?;
    Ok(Publication { index, record_hash: sha256(octets), published: new.published })
}

/// The values of which no two records may share one.
fn uniques(record: &DeviceRecord) -> Vec<(&'static str, Vec<u8>)> {
    let mut uniques = vec![
        ("chip ID", chip_key(&record.chip)),
        ("identity", identity_key(&record.identity)),
        ("certificate serial", [b"t", sha256(&record.serial).as_slice()].concat()),
        ("session", [b"e", record.session.as_bytes().as_slice()].concat()),
    ];
    if let Some(key) = &record.public_key {
        uniques.push(("public key", public_key_key(key)));
    }
    uniques
}

fn is_same_but_for_its_time(known: &DeviceRecord, new: &DeviceRecord) -> bool {
    *known == DeviceRecord { published: known.published, ..new.clone() }
}

fn find(view: &View<'_>, key: &[u8]) -> Result<Option<(DeviceRecord, Vec<u8>, Publication)>, StoreError> {
    index(view, key)?.map(|index| record(view, index)).transpose()
}

fn record(view: &View<'_>, index: u64) -> Result<(DeviceRecord, Vec<u8>, Publication), StoreError> {
    let what = || format!("record {index}");
    let octets = view.get_octets(&record_key(index))?.ok_or_else(|| view.damaged(what(), "it is not there"))?;
    let record = DeviceRecord::from_bytes(&octets).map_err(|e| view.damaged(what(), e))?;
    let publication = Publication { index, record_hash: sha256(&octets), published: record.published };
    Ok((record, octets, publication))
}

fn index(view: &View<'_>, key: &[u8]) -> Result<Option<u64>, StoreError> {
    let Some(octets) = view.get_octets(key)? else { return Ok(None) };
    let octets = octets.try_into().map_err(|_| view.damaged("an index".into(), "it has not 8 octets"))?;
    Ok(Some(u64::from_be_bytes(octets)))
}

fn len(view: &View<'_>) -> Result<u64, StoreError> {
    view.get(LEN, || "the number of records".into())?
        .ok_or_else(|| view.damaged("the number of records".into(), "it is not there"))
}

const LEN: &[u8] = b"n";

fn record_key(index: u64) -> Vec<u8> {
    [b"r", index.to_be_bytes().as_slice()].concat()
}

fn chip_key(chip: &ChipId) -> Vec<u8> {
    [b"c", chip.as_bytes()].concat()
}

fn identity_key(identity: &DeviceIdentity) -> Vec<u8> {
    [b"i", identity.to_string().as_bytes()].concat()
}

fn public_key_key(spki: &[u8]) -> Vec<u8> {
    [b"k", sha256(spki).as_slice()].concat()
}
