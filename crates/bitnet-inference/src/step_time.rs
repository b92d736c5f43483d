//! How much of a step goes to prompts where others write: as much as lets the step take the time it
//! should.
//!
//! A step with many tokens of a prompt takes long, and everybody who writes waits for it. So after a
//! step that took too long, prompts get half of what they had in it, and after one in time in which
//! they had all of their share, they get a little more. Which step computes a token changes none.

use std::time::Duration;

/// Fewest tokens of a step that prompts get: with fewer, they would hardly get on.
const LEAST: usize = 8;

/// The share of prompts in the next step.
#[derive(Debug)]
pub(crate) struct PromptShare {
    target: Duration,
    most: usize,
    tokens: usize,
}

impl PromptShare {
    /// At first all of `step_tokens`.
    pub(crate) fn new(target: Duration, step_tokens: usize) -> Self {
        PromptShare { target, most: step_tokens, tokens: step_tokens }
    }

    /// Tokens that prompts get in the next step.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Learns what a step took in which prompts had so many tokens beside others who write.
    pub(crate) fn learn(&mut self, prompt_tokens: usize, taken: Duration) {
        if taken > self.target {
            self.tokens = (prompt_tokens / 2).max(LEAST.min(self.most));
        } else if prompt_tokens >= self.tokens {
            self.tokens = (self.tokens + self.most.div_ceil(16)).min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: Duration = Duration::from_millis(50);

    /// A machine that takes a millisecond for each token of a prompt, and for the step a few.
    fn taken(prompt_tokens: usize) -> Duration {
        Duration::from_millis(5 + prompt_tokens as u64)
    }

    #[test]
    fn a_share_that_takes_too_long_is_halved_and_grows_again() {
        let mut share = PromptShare::new(TARGET, 128);
        assert_eq!(share.tokens(), 128);
        let mut seen = Vec::new();
        for _ in 0..6 {
            share.learn(share.tokens(), taken(share.tokens()));
            seen.push(share.tokens());
        }
        assert_eq!(seen, [64, 32, 40, 48, 24, 32]);
        // On a machine that is never too slow, all of it.
        for _ in 0..100 {
            share.learn(share.tokens(), TARGET);
        }
        assert_eq!(share.tokens(), 128);
    }

    #[test]
    fn a_short_prompt_in_time_says_nothing_about_a_long_one() {
        let mut share = PromptShare::new(TARGET, 128);
        share.learn(128, taken(128));
        share.learn(10, taken(10));
        assert_eq!(share.tokens(), 64);
    }

    #[test]
    fn prompts_get_on_however_slow_the_machine_is() {
        for (most, least) in [(128, 8), (4, 4)] {
            let mut share = PromptShare::new(Duration::ZERO, most);
            for _ in 0..20 {
                share.learn(share.tokens(), taken(share.tokens()));
            }
            assert_eq!(share.tokens(), least);
        }
    }
}
