//! A line of a question file, in the shapes that people have them.

use serde_json::{Map, Value};

/// A multiple-choice question.
#[derive(Debug, PartialEq, Eq)]
pub struct Question {
    /// What is asked, or the text to continue.
    pub text: String,
    /// Whether it is a question, rather than a text to continue.
    is_question: bool,
    /// What may follow.
    pub choices: Vec<String>,
    /// Which of them is right.
    pub answer: usize,
}

/// Keys of a text to continue.
const PROMPTS: [&str; 3] = ["prompt", "query", "ctx"];
/// The key of a question.
const QUESTION: &str = "question";
/// Keys of the right answer: ours, ARC's, HellaSwag's, lm-evaluation-harness's.
const ANSWERS: [&str; 4] = ["answer", "answerKey", "label", "gold"];

impl Question {
    /// Reads a line of JSON, or says in a few words why it is none.
    pub fn read(line: &str) -> Result<Self, String> {
        let row: Map<String, Value> =
            serde_json::from_str(line).map_err(|_| "is no JSON object".to_owned())?;
        let text = |key: &&str| row.get(*key).and_then(Value::as_str);
        let prompt = PROMPTS.iter().find_map(text);
        let (text, is_question) = match (prompt, text(&QUESTION)) {
            (Some(prompt), _) => (prompt, false),
            (None, Some(question)) => (question, true),
            (None, None) => {
                return Err(format!("has no text in {}, {QUESTION}", PROMPTS.join(", ")));
            }
        };
        if text.trim().is_empty() {
            return Err("has an empty question".to_owned());
        }
        let (choices, labels) = choices(&row)?;
        if choices.len() < 2 {
            return Err("has fewer than two choices".to_owned());
        }
        if choices.iter().any(|choice| choice.trim().is_empty()) {
            return Err("has an empty choice".to_owned());
        }
        let key = ANSWERS.iter().find(|key| row.contains_key(**key));
        let Some(key) = key else {
            return Err(format!("has no {}", ANSWERS.join(", ")));
        };
        let answer = answer(&row[*key], labels.as_deref())
            .filter(|&answer| answer < choices.len())
            .ok_or_else(|| {
                format!("its {key} {} names none of the {} choices", row[*key], choices.len())
            })?;
        Ok(Question { text: text.to_owned(), is_question, choices, answer })
    }

    /// The text that the choices continue.
    pub fn prompt(&self) -> String {
        match self.is_question {
            true => format!("Question: {}\nAnswer:", self.text.trim()),
            false => self.text.clone(),
        }
    }
}

/// The choices, with ARC's labels where there are any.
fn choices(row: &Map<String, Value>) -> Result<(Vec<String>, Option<Vec<String>>), String> {
    let texts = |value: &Value| {
        value.as_array()?.iter().map(|text| text.as_str().map(str::to_owned)).collect()
    };
    let found = match (row.get("choices"), row.get("endings")) {
        (Some(Value::Object(both)), _) => {
            let labels = both.get("label").and_then(texts);
            both.get("text").and_then(texts).map(|choices| (choices, labels))
        }
        (Some(list), _) | (None, Some(list)) => texts(list).map(|choices| (choices, None)),
        (None, None) => None,
    };
    found.ok_or_else(|| "has no list of texts in choices or endings".to_owned())
}

/// An index from 0 as a number or text, a letter, or a label.
fn answer(value: &Value, labels: Option<&[String]>) -> Option<usize> {
    let Some(text) = value.as_str().map(str::trim) else {
        return usize::try_from(value.as_u64()?).ok();
    };
    if let Some(labels) = labels {
        return labels.iter().position(|label| label == text);
    }
    match text.as_bytes() {
        [letter] if letter.is_ascii_alphabetic() => {
            Some(usize::from(letter.to_ascii_uppercase() - b'A'))
        }
        _ => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn read(line: &str, prompt: &str, choices: [&str; 2], answer: usize) {
        let question = Question::read(line).unwrap();
        assert_eq!(question.prompt(), prompt);
        assert_eq!((question.choices, question.answer), (choices.map(String::from).into(), answer));
    }

    #[test]
    fn rows_of_known_shapes_are_read() {
        let plain = "Question: Is it?\nAnswer:";
        read(r#"{"question":"Is it?","choices":["no","yes"],"answer":1}"#, plain, ["no", "yes"], 1);
        read(
            r#"{"question":"Is it?","choices":["no","yes"],"answer":"b"}"#,
            plain,
            ["no", "yes"],
            1,
        );
        read(r#"{"prompt":"It is ","choices":["a","b"],"answer":"0"}"#, "It is ", ["a", "b"], 0);
        // HellaSwag, ARC with digits as labels, an export of lm-evaluation-harness.
        read(r#"{"ctx":"He","endings":["a","b"],"label":"1","ind":4}"#, "He", ["a", "b"], 1);
        read(
            r#"{"question":"Is it?","choices":{"text":["no","yes"],"label":["1","2"]},"answerKey":"2"}"#,
            plain,
            ["no", "yes"],
            1,
        );
        read(r#"{"query":"He","choices":["a","b"],"gold":0}"#, "He", ["a", "b"], 0);
    }

    #[test]
    fn other_rows_say_what_is_wrong() {
        let cases = [
            ("[1]", "is no JSON object"),
            ("{", "is no JSON object"),
            (r#"{"choices":["a","b"],"answer":0}"#, "has no text in prompt, query, ctx, question"),
            (r#"{"question":" ","choices":["a","b"],"answer":0}"#, "has an empty question"),
            (r#"{"question":"x","answer":0}"#, "has no list of texts"),
            (r#"{"question":"x","choices":["a",1],"answer":0}"#, "has no list of texts"),
            (r#"{"question":"x","choices":["a"],"answer":0}"#, "has fewer than two choices"),
            (r#"{"question":"x","choices":["a",""],"answer":0}"#, "has an empty choice"),
            (r#"{"question":"x","choices":["a","b"]}"#, "has no answer, answerKey"),
            (r#"{"question":"x","choices":["a","b"],"answer":2}"#, "its answer 2 names none"),
            (r#"{"question":"x","choices":["a","b"],"answer":"C"}"#, "its answer \"C\" names none"),
            (r#"{"question":"x","choices":["a","b"],"answer":-1}"#, "its answer -1 names none"),
        ];
        for (line, reason) in cases {
            let found = Question::read(line).unwrap_err();
            assert!(found.starts_with(reason), "{line}: {found}");
        }
    }
}
