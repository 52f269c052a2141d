//! The script that the crash tests run: numbered batches from whose remains one can tell what survived.

use std::ops::ControlFlow;

use palyra_storage::{Batch, Engine, Family};

/// Batch `number` touches all families: a counter, a log entry, and, now and then, a purge of old entries.
/// Whatever prefix survives, all three must tell the same number.
pub(crate) fn batch(number: u64) -> Batch {
    let mut batch = Batch::new();
    batch.put(Family::Meta, "count", number.to_be_bytes().to_vec());
    batch.put(
        Family::Log,
        number.to_be_bytes().to_vec(),
        vec![number as u8; (number % 700) as usize],
    );
    batch.put(
        Family::State,
        format!("k{}", number % 50),
        number.to_be_bytes().to_vec(),
    );
    if number.is_multiple_of(20) {
        batch.delete_range(
            Family::Log,
            0_u64.to_be_bytes().to_vec(),
            (number - 10).to_be_bytes().to_vec(),
        );
    }
    batch
}

/// The number of the last batch in the folder, after checking that it is there as a whole, and so is all
/// before it.
pub(crate) fn survived(engine: &dyn Engine) -> u64 {
    let number = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().unwrap());
    let count = engine
        .get(Family::Meta, b"count")
        .unwrap()
        .map_or(0, |bytes| number(&bytes));
    let mut log = Vec::new();
    let collect = &mut |key: &[u8], value: &[u8]| {
        let index = number(key);
        assert_eq!(value, vec![index as u8; (index % 700) as usize], "entry {index}");
        log.push(index);
        ControlFlow::Continue(())
    };
    engine.scan(Family::Log, b"", &[0xff; 9], collect).unwrap();
    let first = (count / 20 * 20).saturating_sub(10).max(1);
    assert_eq!(
        log,
        (first..=count).collect::<Vec<_>>(),
        "the log of batch {count}"
    );
    for slot in 0..50 {
        let latest = (1..=count).rev().find(|number| number % 50 == slot);
        let found = engine.get(Family::State, format!("k{slot}").as_bytes()).unwrap();
        assert_eq!(
            found.map(|bytes| number(&bytes)),
            latest,
            "the state of batch {count}, slot {slot}"
        );
    }
    count
}
