//! What only this engine must do; what every public database must do is in `store/contract_public.rs`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::*;
use crate::store::contract_public::{PublicFactory, contract_of_publication, record};
use crate::store::testing::Faults;
use crate::store::{DeviceRecord, PublicDatabase, PublishError, StoreError, StoreOptions};
use crate::tlog::testing::LocalSigner;

struct Log {
    dir: tempfile::TempDir,
    signer: Arc<LocalSigner>,
}

impl Log {
    fn dir(&self) -> PathBuf {
        self.dir.path().join("public")
    }

    async fn open_through(&self, faults: &Arc<Faults>) -> TransparencyLog {
        let settings = LogSettings::default();
        TransparencyLog::open_through(&self.dir(), &options(), self.signer.clone(), settings, faults.clone())
            .await
            .unwrap()
    }

    async fn open(&self) -> TransparencyLog {
        self.try_open().await.unwrap()
    }

    async fn try_open(&self) -> Result<TransparencyLog, StoreError> {
        TransparencyLog::open(&self.dir(), &options(), self.signer.clone(), LogSettings::default()).await
    }
}

#[async_trait]
impl PublicFactory for Log {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        TransparencyLog::create(&dir.path().join("public"), &options()).unwrap();
        Self { dir, signer: Arc::new(LocalSigner::new("log.example/test")) }
    }

    async fn public(&self) -> Arc<dyn PublicDatabase> {
        Arc::new(self.open().await)
    }
}

contract_of_publication!(keeps_the_contract, Log);

fn options() -> StoreOptions {
    StoreOptions { floor_bytes: 16 << 20, reserve_bytes: 1 << 20, ..StoreOptions::default() }
}
#[tokio::test]
async fn a_publication_that_failed_is_in_once_after_repeating_it() {
    for persisted in [false, true] {
        let (log, faults) = (Log::new(), Arc::new(Faults::default()));
        let public = log.open_through(&faults).await;
        public.publish(&record(0)).await.unwrap();
        let fault = if persisted { &faults.in_sync } else { &faults.before_apply };
        fault.store(true, SeqCst);
        assert!(matches!(public.publish(&record(1)).await, Err(PublishError::Store(error)) if is_away(&error)));
        fault.store(false, SeqCst);
        let begun = Instant::now();
        let publication = loop {
            match public.publish(&DeviceRecord { published: 7777, ..record(1) }).await {
                Ok(publication) => break publication,
                Err(error) => assert!(begun.elapsed() < Duration::from_secs(20), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert_eq!(publication.index, 1);
        assert_eq!(publication.published, if persisted { record(1).published } else { 7777 });
        assert_eq!(public.len().await.unwrap(), 2);
    }
}

#[tokio::test]
async fn a_new_record_is_refused_below_the_floor_and_a_repeat_answered() {
    let (log, faults) = (Log::new(), Arc::new(Faults::default()));
    let public = log.open_through(&faults).await;
    let first = public.publish(&record(1)).await.unwrap();
    faults.free.store(12 << 20, SeqCst);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(public.publish(&record(1)).await.unwrap(), first);
    let refused = public.publish(&record(2)).await;
    assert!(matches!(refused, Err(PublishError::Store(StoreError::Full { .. }))), "{refused:?}");
}

fn is_away(error: &StoreError) -> bool {
    matches!(error, StoreError::Failed { .. })
}
