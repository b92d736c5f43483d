//! Conversations that are saved and come back.

use std::fs;
use std::path::Path;

use bitnet_core::Shortcuts;
use bitnet_inference::{
    ConversationError, Device, Engine, EngineOptions, Error, Event, KvType, Model, ModelOptions,
    Request, SamplingParams, Usage,
};
use bitnet_testing::{Random, altered_tiny_model};
use sha2::{Digest, Sha256};

fn open(model: &str, stages: usize, threads: usize) -> Model {
    let options = ModelOptions { threads: Some(threads), ..ModelOptions::default() };
    Model::open_distributed(model, &vec![Device::Cpu; stages], &options).unwrap()
}

/// An engine with room for so many blocks of 16 tokens in each replica.
fn engine(model: &Model, kv_type: KvType, replicas: usize, blocks: usize) -> Engine {
    let bytes = model.config().kv_layout(kv_type, 16).block_bytes() * blocks * replicas;
    let options =
        EngineOptions { kv_type, replicas, kv_bytes: bytes as u64, ..EngineOptions::default() };
    model.engine(options).unwrap()
}

/// The tokens after a prompt, and what they took.
fn ask(engine: &Engine, prompt: &[u32]) -> Result<(Vec<u32>, Usage), Error> {
    let sampling = SamplingParams { temperature: 1.0, seed: 5, ..SamplingParams::default() };
    let mut stream = engine.submit(Request::new(prompt.to_vec(), sampling, 12))?;
    let mut tokens = Vec::new();
    loop {
        match stream.next().expect("an end comes")? {
            Event::Token(token) => tokens.push(token.id),
            Event::Finished(finish) => return Ok((tokens, finish.usage)),
        }
    }
}

fn conversation(length: usize) -> Vec<u32> {
    (0..length).map(|i| (i * i * 31 % 2000) as u32).collect()
}

/// Why a file is refused. The message names it.
fn refused(engine: &Engine, path: &Path) -> ConversationError {
    let error = engine.restore(path).unwrap_err();
    let message = error.to_string();
    assert!(message.starts_with(&format!("{}: ", path.display())), "{message}");
    assert!(message.len() < 400 && !message.contains(char::is_control), "{message:?}");
    match error {
        Error::Conversation { reason, .. } => reason,
        other => panic!("{other}"),
    }
}

#[test]
fn a_continuation_starts_with_what_was_saved_and_gets_the_same_tokens() {
    let folder = tempfile::tempdir().unwrap();
    for kv_type in [KvType::F32, KvType::F16, KvType::Int8] {
        for length in [1, 15, 16, 17, 100, 128] {
            let tokens = conversation(length);
            let prompt = [&tokens[..], &[7, 8, 9]].concat();
            let (saving, restoring) = (open("tiny", 1, 1), open("tiny", 2, 2));
            let before = engine(&saving, kv_type, 1, 40);
            let expected = ask(&before, &prompt).unwrap().0;
            let path = folder.path().join(format!("{}-{length}", kv_type.name()));
            before.save(&tokens, &path).unwrap();
            // A fresh engine that had to compute all of it writes the same bytes, whatever it runs on.
            let again = folder.path().join("again");
            engine(&restoring, kv_type, 1, 40).save(&tokens, &again).unwrap();
            assert!(fs::read(&path).unwrap() == fs::read(&again).unwrap());

            let after = engine(&restoring, kv_type, 2, 40);
            assert_eq!(after.restore(&path).unwrap(), tokens);
            let statistics = after.statistics().unwrap();
            assert_eq!(statistics.kv.idle_blocks, 2 * (length / 16));
            assert_eq!((statistics.kv.used_blocks, statistics.computed_tokens), (0, 0));
            let (found, usage) = ask(&after, &prompt).unwrap();
            assert_eq!(found, expected);
            assert_eq!(usage.reused_tokens, length / 16 * 16);
            // Once more, beside the same blocks in use.
            let mut running = Request::new(prompt.clone(), SamplingParams::default(), 100);
            running.buffer = 1;
            let _running = after.submit(running).unwrap();
            assert_eq!(after.restore(&path).unwrap(), tokens);
            assert_eq!(ask(&after, &prompt).unwrap().0, expected);
        }
    }
}

#[test]
fn a_file_that_does_not_fit_the_engine_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let model = open("tiny", 1, 1);
    let path = folder.path().join("saved");
    let tokens = conversation(100);
    engine(&model, KvType::F32, 1, 40).save(&tokens, &path).unwrap();
    let whole = fs::read(&path).unwrap();
    let ours = engine(&model, KvType::F32, 1, 40);
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole.clone();
        change(&mut bytes);
        let path = folder.path().join("changed");
        fs::write(&path, bytes).unwrap();
        refused(&ours, &path)
    };
    use ConversationError as E;
    let other = folder.path().join("model");
    fs::create_dir(&other).unwrap();
    altered_tiny_model(&other, "config.json", "\"rope_theta\": 10000.0", "\"rope_theta\": 9999.0");
    let other = open(other.to_str().unwrap(), 1, 1);
    assert!(matches!(refused(&engine(&other, KvType::F32, 1, 40), &path), E::OtherModel));
    let half = refused(&engine(&model, KvType::F16, 1, 40), &path);
    assert!(matches!(&half, E::OtherKvType { found, engine: KvType::F16 } if found == "f32"));
    let blocks = EngineOptions { block_tokens: 32, ..EngineOptions::default() };
    let blocks = refused(&model.engine(blocks).unwrap(), &path);
    assert!(matches!(blocks, E::OtherBlocks { found: 16, engine: 32 }));
    assert!(matches!(refused(&engine(&model, KvType::F32, 1, 5), &path), E::NoRoom { needed: 6 }));

    assert!(matches!(refused(&ours, &folder.path().join("none")), E::Io(_)));
    assert!(matches!(refused(&ours, folder.path()), E::NotAFile));
    assert!(matches!(changed(&|bytes| bytes.clear()), E::NotAConversation));
    assert!(matches!(changed(&|bytes| bytes[0] = 0), E::NotAConversation));
    assert!(matches!(changed(&|bytes| bytes[8] = 9), E::Version(9)));
    // 2 was int8 in another layout.
    let older = changed(&|bytes| bytes[12] = 2);
    assert!(matches!(&older, E::OtherKvType { found, .. } if found == "number 2"));
    assert!(matches!(changed(&|bytes| bytes[16] = 1), E::OtherModel));
    let long = changed(&|bytes| bytes[32..36].fill(0xff));
    assert!(matches!(long, E::TooLong { found: 0xffff_ffff, context_length: 512 }));
    assert!(matches!(changed(&|bytes| bytes[36] ^= 1), E::OtherModel));
    assert!(matches!(changed(&|bytes| bytes.truncate(5000)), E::Length { found: 5000, .. }));
    assert!(matches!(changed(&|bytes| bytes.push(0)), E::Length { .. }));
    assert!(matches!(changed(&|bytes| bytes[1000] ^= 1), E::Checksum));
    // Nothing of all that was restored.
    assert_eq!(ours.statistics().unwrap().kv.idle_blocks, 0);
    assert_eq!(ours.restore(&path).unwrap(), tokens);

    let options = ModelOptions { shortcuts: Some(Shortcuts::NONE), ..ModelOptions::default() };
    let plain = Model::open("tiny", &options).unwrap().engine(EngineOptions::default()).unwrap();
    assert!(matches!(refused(&plain, &path), E::NoPrefixes));
    let reason = plain.save(&tokens, &path).unwrap_err();
    assert!(matches!(reason, Error::Conversation { reason: E::NoPrefixes, .. }));
    assert!(matches!(ours.save(&[], &path), Err(Error::EmptyPrompt)));
    let nowhere = ours.save(&tokens, folder.path().join("none/saved"));
    assert!(matches!(nowhere, Err(Error::Conversation { reason: E::Io(_), .. })));
}

#[test]
fn restoring_takes_no_block_that_somebody_uses() {
    let folder = tempfile::tempdir().unwrap();
    let model = open("tiny", 1, 1);
    let path = folder.path().join("saved");
    engine(&model, KvType::F32, 1, 40).save(&conversation(100), &path).unwrap();
    let engine = engine(&model, KvType::F32, 1, 8);
    let mut running = Request::new(vec![5; 40], SamplingParams::default(), 60);
    running.buffer = 1;
    let mut running = engine.submit(running).unwrap();
    assert!(running.next().is_some());
    assert!(matches!(refused(&engine, &path), ConversationError::NoRoom { needed: 6 }));
    drop(running);
    while engine.statistics().unwrap().kv.used_blocks > 0 {
        std::thread::yield_now();
    }
    assert_eq!(engine.restore(&path).unwrap(), conversation(100));
}

#[test]
fn damaged_conversations_end_in_errors() {
    let folder = tempfile::tempdir().unwrap();
    let model = open("tiny", 1, 1);
    let path = folder.path().join("saved");
    let tokens = conversation(40);
    for kv_type in [KvType::F32, KvType::Int8] {
        let engine = engine(&model, kv_type, 1, 8);
        engine.save(&tokens, &path).unwrap();
        let whole = fs::read(&path).unwrap();
        let random = &mut Random::new(3);
        let (mut restored, count) = (0, 400);
        for number in 0..count {
            let mut bytes = whole.clone();
            for _ in 0..=random.below(3) {
                // Mostly in the header and the tokens.
                let most = if random.below(4) == 0 { bytes.len() } else { 240.min(bytes.len()) };
                let at = random.below(most.max(1)).min(bytes.len().saturating_sub(4));
                match random.below(6) {
                    _ if bytes.len() < 4 => {}
                    0 => bytes.truncate(at),
                    1 => bytes[at..at + 4].fill(0xff),
                    2 => bytes[at..at + 4].fill(0),
                    3 => bytes.insert(at, random.bits() as u8),
                    4 => bytes[at] ^= 1 << random.below(8),
                    _ => bytes[at] = random.bits() as u8,
                }
            }
            if number % 2 == 0 && bytes.len() > 32 {
                let end = bytes.len() - 32;
                let digest = Sha256::digest(&bytes[..end]);
                bytes[end..].copy_from_slice(&digest);
            }
            fs::write(&path, bytes).unwrap();
            match engine.restore(&path) {
                Ok(tokens) => {
                    restored += 1;
                    // Whatever the numbers are, this ends.
                    let _ = ask(&engine, &[&tokens[..], &[1]].concat());
                }
                Err(error) => assert!(error.to_string().len() < 400, "{error}"),
            }
        }
        assert!((1..count / 2).contains(&restored), "{restored} of {count} were restored");
        assert_eq!(engine.statistics().unwrap().kv.used_blocks, 0);
    }
}

#[test]
fn keys_and_values_that_are_no_numbers_harm_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    let model = open("tiny", 1, 1);
    let path = folder.path().join("saved");
    let tokens = conversation(64);
    for kv_type in [KvType::F32, KvType::F16, KvType::Int8] {
        let engine = engine(&model, kv_type, 1, 40);
        let expected = ask(&engine, &[1, 2, 3]).unwrap().0;
        engine.save(&[vec![1], tokens.clone()].concat(), &path).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let end = bytes.len() - 32;
        bytes[68 + 4 * 65..end].fill(0xff);
        let digest = Sha256::digest(&bytes[..end]);
        bytes[end..].copy_from_slice(&digest);
        fs::write(&path, bytes).unwrap();
        let engine = self::engine(&model, kv_type, 1, 40);
        let prompt = engine.restore(&path).unwrap();
        let _ = ask(&engine, &prompt);
        assert_eq!(ask(&engine, &[1, 2, 3]).unwrap().0, expected);
    }
}
