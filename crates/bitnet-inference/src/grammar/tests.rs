use bitnet_model::tokenizer::GgufVocabulary;
use bitnet_testing::Random;

use super::*;

/// A grammar whose parser panics from now on.
pub(crate) fn broken(mut grammar: Grammar) -> Grammar {
    let parser = &mut grammar.parser.parser;
    // What it locks is poisoned afterwards.
    let panic = catch_unwind(AssertUnwindSafe(|| parser.test_trigger_lexer_error()));
    assert!(panic.is_err());
    grammar
}

/// A SentencePiece vocabulary: all bytes, some characters and words, and a long one. `A` is
/// there twice, as a byte and as a character.
fn sentence_piece() -> Arc<Vocabulary> {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend((b' '..=b'~').map(|byte| char::from(byte).to_string().replace(' ', "▁")));
    tokens.extend(
        ["▁▁▁", "▁cat", "ca", "größe", "é", "🙂", "\":", "{\"", "</s", "ÿ"].map(str::to_owned),
    );
    tokens.push("x".repeat(5000));
    let kind = |id: usize| match id {
        0 => 2,
        1 | 2 => 3,
        3..=258 => 6,
        _ => 1,
    };
    let count = tokens.len();
    let tokenizer = Tokenizer::from_gguf(GgufVocabulary {
        model: "llama".to_owned(),
        token_types: (0..count).map(kind).collect(),
        scores: (0..count).map(|id| -(id as f32)).collect(),
        tokens,
        bos: Some(1),
        eos: Some(2),
        ..GgufVocabulary::default()
    });
    Vocabulary::new(Arc::new(tokenizer.unwrap().0), count + 7)
}

/// A text of tokens that are drawn evenly from those that may come next.
fn walk(vocabulary: &Vocabulary, constraint: &Constraint, random: &mut Random) -> String {
    let end_ids = BTreeSet::from([2]);
    let mut grammar = Grammar::new(vocabulary, constraint, &end_ids).unwrap();
    let mut ids = Vec::new();
    while !grammar.is_complete() {
        let allowed: Vec<u32> = grammar.allowed().ids().collect();
        assert!(allowed.is_sorted_by(|a, b| a < b), "{allowed:?}");
        let id = allowed[random.below(allowed.len())];
        if id == 2 {
            break;
        }
        ids.push(id);
        grammar.advance(id).unwrap();
    }
    let tokenizer = vocabulary.tokenizer.as_ref().unwrap();
    let bytes = ids.iter().flat_map(|&id| tokenizer.token_bytes(id).unwrap());
    String::from_utf8(bytes.copied().collect()).expect("a grammar is about characters")
}

#[test]
fn tokens_without_text_cannot_be_constrained() {
    let constraint = Constraint::Regex("a".to_owned());
    let grammar =
        Grammar::new(&Vocabulary::without_text(9), &constraint, &BTreeSet::new()).map(drop);
    assert_eq!(
        grammar.unwrap_err().to_string(),
        "no output of this model can be constrained here: its tokens stand for no text"
    );
}

#[test]
fn sentence_piece_tokens_have_their_true_bytes() {
    let vocabulary = sentence_piece();
    let random = &mut Random::new(7);
    let schema = r#"{
        "type": "object",
        "properties": {"größe 🙂": {"type": "string", "maxLength": 6}, "é": {"enum": ["   cat", "ÿ</s>"]}},
        "required": ["größe 🙂", "é"], "additionalProperties": false
    }"#;
    let constraint = Constraint::JsonSchema(schema.to_owned());
    let words = BTreeSet::from_iter((0..100).map(|_| {
        let text = walk(&vocabulary, &constraint, random);
        let value: Value = serde_json::from_str(&text).unwrap();
        let object = value.as_object().unwrap();
        assert_eq!(object.len(), 2, "{text}");
        assert!(object["größe 🙂"].as_str().unwrap().chars().count() <= 6, "{text}");
        object["é"].as_str().unwrap().to_owned()
    }));
    assert_eq!(words, ["   cat", "ÿ</s>"].map(str::to_owned).into());
}

#[test]
fn special_tokens_are_none_of_the_characters_of_their_names() {
    let vocabulary = sentence_piece();
    let ids = |constraint: &str| {
        let constraint = Constraint::Lark(constraint.to_owned());
        let grammar = Grammar::new(&vocabulary, &constraint, &BTreeSet::from([2])).unwrap();
        grammar.allowed().ids().collect::<BTreeSet<u32>>()
    };
    let text = ids("start: \"<s>\" | \"</s>\" | \"<unk>\"");
    assert!(text.is_disjoint(&BTreeSet::from([0, 1, 2])) && text.len() > 1, "{text:?}");
    // A grammar can ask for one by its name.
    assert_eq!(ids("start: <s> \"a\""), BTreeSet::from([1]));
    // Byte 0xFF is in no text, and the token of 5000 bytes is out of bounds.
    let any = ids("start: /(?s:.){1,6000}/");
    assert!(!any.contains(&(3 + 255)) && !any.contains(&(vocabulary.size as u32 - 8)));
    assert!(any.contains(&(3 + 65)) && any.contains(&(3 + 256 + 65 - 32)), "both A");
}

#[test]
fn a_parser_that_panics_is_an_error() {
    let vocabulary = sentence_piece();
    let constraint = Constraint::Regex("[a-z]+".to_owned());
    let grammar = Grammar::new(&vocabulary, &constraint, &BTreeSet::new()).unwrap();
    let first = grammar.allowed().ids().next().unwrap();
    let error = broken(grammar).advance(first).unwrap_err();
    assert!(matches!(error, ConstraintError::Broken { .. }), "{error}");
}

/// Texts that are as deep, wide or ambiguous as their length allows: none takes long, and no stack
/// overflows, be it that of a test's thread.
#[test]
fn hostile_constraints_are_refused_or_work() {
    let vocabulary = sentence_piece();
    // As many parts as there is room for.
    let fill = |part: &dyn Fn(usize) -> String, separator: &str| {
        let count = MOST_BYTES / (part(9999).len() + separator.len()) - 20;
        (0..count).map(part).collect::<Vec<_>>().join(separator)
    };
    let schema = |text: String| Constraint::JsonSchema(text);
    let chain = |link: &dyn Fn(usize) -> String| {
        let links = fill(link, ",");
        let last = links.matches("\"#/").count();
        schema(format!(r##"{{"$ref":"#/$defs/0","$defs":{{{links},"{last}":{{}}}}}}"##))
    };
    let rules = |letter: char| {
        let rules = fill(&|i| format!("{letter}{i}: {letter}{}", i + 1), "\n");
        let last = rules.lines().count();
        Constraint::Lark(format!("start: {letter}0\n{rules}\n{letter}{last}: \"a\""))
    };
    let nested = |open: &str, close: &str| format!("{}1{}", open.repeat(9000), close.repeat(9000));
    let constraints = [
        chain(&|i| format!(r##""{i}":{{"$ref":"#/$defs/{}"}}"##, i + 1)),
        chain(&|i| format!(r##""{i}":{{"allOf":[{{"$ref":"#/$defs/{}"}}]}}"##, i + 1)),
        chain(&|i| format!(r##""{i}":{{"items":{{"$ref":"#/$defs/{}"}},"minItems":1}}"##, i + 1)),
        schema(nested("[", "]")),
        schema(r#"{"minItems": 1000000000, "type": "array"}"#.to_owned()),
        schema(r#"{"maxLength": 1000000000, "minLength": 1000000, "type": "string"}"#.to_owned()),
        schema(r#"{"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"}"#.to_owned()),
        schema(r#"{"multipleOf": 0}"#.to_owned()),
        schema(r#"{"multipleOf": 1e300}"#.to_owned()),
        schema(format!(r#"{{"enum":[{}]}}"#, fill(&|i| format!(r#""{i}""#), ","))),
        schema(format!(
            r#"{{"allOf":[{}]}}"#,
            fill(
                &|i| format!(r#"{{"anyOf":[{{"required":["{i}"]}},{{"required":["a{i}"]}}]}}"#),
                ","
            )
        )),
        Constraint::Regex(nested("(", ")")),
        Constraint::Regex("(((a{1,100}){1,100}){1,100}){1,100}".to_owned()),
        Constraint::Regex("(a|b)*a(a|b){40}".to_owned()),
        Constraint::Lark(format!("start: {}", nested("(", ")"))),
        rules('r'),
        rules('R'),
        Constraint::Lark("start: start start | \"a\" | ".to_owned()),
        Constraint::Lark("start: T\nT: /(.*a.{40})/ & /(.*b.{40})/ & ~/(.*c.{40})/".to_owned()),
    ];
    let random = &mut Random::new(3);
    let mut refused = 0;
    for constraint in &constraints {
        let grammar = Grammar::new(&vocabulary, constraint, &BTreeSet::from([2]));
        let Ok(mut grammar) = grammar else {
            refused += 1;
            continue;
        };
        for _ in 0..20 {
            let allowed: Vec<u32> = grammar.allowed().ids().filter(|&id| id != 2).collect();
            if allowed.is_empty() || grammar.advance(allowed[random.below(allowed.len())]).is_err()
            {
                break;
            }
        }
    }
    println!("{refused} of {} refused", constraints.len());
    assert!(refused > 3 && refused < constraints.len() - 3, "{refused}");
}

#[test]
fn common_multiples_count_in_the_last_decimal_place() {
    let multiple = |numbers: &[&str]| {
        common_multiple(&numbers.iter().map(|&number| number.to_owned()).collect::<Vec<_>>())
    };
    assert_eq!(multiple(&[]), Some(1));
    assert_eq!(multiple(&["4", "6"]), Some(12));
    assert_eq!(multiple(&["0.01", "7"]), Some(700));
    assert_eq!(multiple(&["0.01"]), Some(100));
    assert_eq!(multiple(&["1e2", "2.50e1"]), Some(100));
    assert_eq!(multiple(&["1e-3"]), Some(1000));
    for bad in ["0", "-3", "1e300", "1e-300", "18446744073709551616", "0.00000000000000000001"] {
        assert_eq!(multiple(&[bad]), None, "{bad}");
    }
}
