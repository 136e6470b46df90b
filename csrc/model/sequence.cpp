// Pages are taken before a step and given back by whoever drops them; see sequence.h for who may call what when.
#include "model/sequence.h"

#include <algorithm>
#include <set>
#include <stdexcept>

#include "error.h"

namespace pyllama {
namespace {

size_t pages_for(size_t n_tok) { return (n_tok + kPageTok - 1) / kPageTok; }

}  // namespace

int PagePool::take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return new_page();
}

int PagePool::copy_of(int page) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int copy = new_page();
  backend_->copy_page(page, copy);
  return copy;
}

bool PagePool::shared(int page) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return n_holders_[static_cast<size_t>(page)] > 1;
}

void PagePool::share(const int* pages, size_t n_pages) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < n_pages; ++i) ++n_holders_[static_cast<size_t>(pages[i])];
}

void PagePool::give_back(const int* pages, size_t n_pages) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < n_pages; ++i) {
    if (--n_holders_[static_cast<size_t>(pages[i])] > 0) continue;
    if (in_step_) {
      returned_.push_back(pages[i]);
    } else {
      free_page(pages[i]);
    }
  }
}

void PagePool::step_begins() {
  const std::lock_guard<std::mutex> lock(mutex_);
  in_step_ = true;
}

void PagePool::step_ended() {
  const std::lock_guard<std::mutex> lock(mutex_);
  in_step_ = false;
  for (const int page : returned_) free_page(page);
  returned_.clear();
}

int PagePool::pages_in_use() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return in_use_;
}

int PagePool::pages_of(const std::vector<const Sequence*>& sequences) const {
  std::set<int> pages;
  for (const Sequence* sequence : sequences) {
    check<std::invalid_argument>(sequence && sequence->belongs_to(*this), "expected sequences of this model");
    for (const int page : sequence->page_list()) pages.insert(page);
  }
  return static_cast<int>(pages.size());
}

int PagePool::new_page() {
  const int page = backend_->new_page();
  const auto at = static_cast<size_t>(page);
  try {
    if (n_holders_.size() <= at) n_holders_.resize(at + 1);
    returned_.reserve(n_holders_.size());  // so that give_back cannot throw
  } catch (...) {
    backend_->free_page(page);
    throw;
  }
  n_holders_[at] = 1;
  ++in_use_;
  return page;
}

void PagePool::free_page(int page) {
  backend_->free_page(page);
  --in_use_;
}

Sequence::~Sequence() { keep_pages(0); }

int Sequence::n_past() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int>(tokens_.size());
}

std::vector<int> Sequence::page_list() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return pages_;
}

std::vector<int32_t> Sequence::tokens() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return tokens_;
}

int Sequence::prompt_len() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return prompt_len_;
}

void Sequence::set_prompt_len(int n) {
  check<std::invalid_argument>(n >= 0, "prompt_len is ", n, ", expected 0 or more");
  const std::lock_guard<std::mutex> lock(mutex_);
  prompt_len_ = n;
}

void Sequence::truncate(int n) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_idle();
  check_holds(n, "truncate to");
  tokens_.resize(static_cast<size_t>(n));
  keep_pages(pages_for(tokens_.size()));
}

std::unique_ptr<Sequence> Sequence::fork(int n) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_idle();
  check<std::invalid_argument>(!closed_, "the sequence is closed");
  check_holds(n, "fork");
  const auto n_tok = static_cast<size_t>(n);
  auto made = std::make_unique<Sequence>(pool_);
  made->tokens_.assign(tokens_.begin(), tokens_.begin() + n);
  made->prompt_len_ = prompt_len_;
  std::vector<int> pages(pages_.begin(), pages_.begin() + static_cast<std::ptrdiff_t>(pages_for(n_tok)));
  pool_->share(pages.data(), pages.size());
  made->pages_ = std::move(pages);
  return made;
}

void Sequence::close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_idle();
  closed_ = true;
  tokens_.clear();
  keep_pages(0);
}

void Sequence::prepare(int n_new) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_idle();
  check<std::invalid_argument>(!closed_, "the sequence is closed");
  const size_t n_tok = tokens_.size() + static_cast<size_t>(n_new);
  const size_t needed = pages_for(n_tok);
  // All memory is had here, so that no page in hand is lost to bad_alloc and commit() cannot fail.
  if (tokens_.capacity() < n_tok) tokens_.reserve(std::max(n_tok, 2 * tokens_.capacity()));
  pages_.reserve(needed);
  own_last_page();
  try {
    while (pages_.size() < needed) pages_.push_back(pool_->take());
  } catch (...) {
    restore_pages();
    throw;
  }
  in_step_ = true;
}

void Sequence::commit(const int32_t* new_tokens, int n_new) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  tokens_.insert(tokens_.end(), new_tokens, new_tokens + n_new);
  if (shared_page_ != kNoPage) pool_->give_back(&shared_page_, 1);
  shared_page_ = kNoPage;
  in_step_ = false;
  keep_pages(pages_for(tokens_.size()));
}

void Sequence::abandon() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  in_step_ = false;
  restore_pages();
}

void Sequence::check_idle() const {
  check<std::invalid_argument>(!in_step_, "the sequence is in a step that is still running in another thread");
}

void Sequence::check_holds(int n, const char* to_do) const {
  check<std::invalid_argument>(n >= 0 && static_cast<size_t>(n) <= tokens_.size(), "cannot ", to_do, " ", n,
                               " tokens, the sequence holds ", tokens_.size());
}

// A page that is to be written into must not be held by others. The original stays held until the step's end, so that
// abandon() can put it back.
void Sequence::own_last_page() {
  if (tokens_.size() % kPageTok == 0 || !pool_->shared(pages_.back())) return;
  const int copy = pool_->copy_of(pages_.back());
  shared_page_ = pages_.back();
  pages_.back() = copy;
}

void Sequence::restore_pages() noexcept {
  keep_pages(pages_for(tokens_.size()));
  if (shared_page_ == kNoPage) return;
  std::swap(pages_.back(), shared_page_);
  pool_->give_back(&shared_page_, 1);
  shared_page_ = kNoPage;
}

void Sequence::keep_pages(size_t n_pages) {
  if (n_pages >= pages_.size()) return;
  pool_->give_back(pages_.data() + n_pages, pages_.size() - n_pages);
  pages_.resize(n_pages);
}

}  // namespace pyllama
