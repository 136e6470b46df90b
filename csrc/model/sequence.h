// What changes while a text is generated: its tokens and the pages that hold their keys and values. Sequences that
// begin alike share pages: a page that several hold is only read, and who has to write into one gets a copy when a step
// prepares. The pool belongs to the Model and its sequences together, so any of them may go first. Which rows a step
// runs, and when its result counts, is forward.cpp's business: a step prepares, and only one that succeeded commits.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "backend.h"

namespace pyllama {

class Sequence;

// The backend's pages and how many sequences hold each. Pages that nobody holds any more while a step runs (another
// thread dropped a sequence) wait until it has ended, so that a backend never sees two calls at once.
class PagePool {
 public:
  explicit PagePool(std::unique_ptr<Backend> backend) : backend_(std::move(backend)) {}

  Backend& backend() { return *backend_; }
  int take();                                    // not during a step, as copy_of
  int copy_of(int page);                         // a page of one's own with the same content
  bool shared(int page);                         // whether other sequences than the caller's hold it too
  void share(const int* pages, size_t n_pages);  // pages that the caller's sequence holds get one more holder
  void give_back(const int* pages, size_t n_pages);
  void step_begins();
  void step_ended();
  int pages_in_use();  // pages that sequences hold, each counted once, or have dropped during a step that still runs
  int pages_of(const std::vector<const Sequence*>& sequences) const;  // that these hold, each counted once

 private:
  int new_page();
  void free_page(int page);

  std::unique_ptr<Backend> backend_;
  std::mutex mutex_;
  bool in_step_ = false;
  int in_use_ = 0;
  std::vector<int> n_holders_;  // [page]
  std::vector<int> returned_;   // during a step
};

class Sequence {
 public:
  explicit Sequence(std::shared_ptr<PagePool> pool) : pool_(std::move(pool)) {}
  ~Sequence();
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  int n_past() const;
  std::vector<int32_t> tokens() const;
  int prompt_len() const;
  void set_prompt_len(int n);
  // Keeps the first n tokens. std::invalid_argument when n is not in 0 … n_past or a step is running with it.
  void truncate(int n);
  // A new sequence with the first n tokens, in the same pages: it costs no memory until one of the two is continued,
  // then a copy of the last page unless n is a multiple of kPageTok. Throws as truncate, and for a closed sequence.
  std::unique_ptr<Sequence> fork(int n) const;
  // Gives everything back; a closed sequence cannot be used again.
  void close();

  bool belongs_to(const PagePool& pool) const { return pool_.get() == &pool; }

  std::vector<int> page_list() const;

  // The three moments of a step; only forward.cpp calls them. After prepare(), pages() covers n_new more tokens, none
  // of them in a page that others hold, and the sequence refuses to change until commit(), of one token to n_new, or
  // abandon(), after which it has the pages that it had before.
  void prepare(int n_new);
  void commit(const int32_t* new_tokens, int n_new) noexcept;
  void abandon() noexcept;
  const std::vector<int32_t>& history() const { return tokens_; }  // only between prepare and commit
  const std::vector<int>& pages() const { return pages_; }

 private:
  static constexpr int kNoPage = -1;

  void check_idle() const;
  void check_holds(int n, const char* to_do) const;
  void own_last_page();
  void restore_pages() noexcept;
  void keep_pages(size_t n_pages);

  std::shared_ptr<PagePool> pool_;
  mutable std::mutex mutex_;  // guards what follows; held for moments only, never across a call into Python
  std::vector<int32_t> tokens_;
  std::vector<int> pages_;     // pages_[i] holds positions i * kPageTok …
  int shared_page_ = kNoPage;  // during a step: the page that was replaced by a copy, still held
  int prompt_len_ = 0;
  bool in_step_ = false;
  bool closed_ = false;
};

}  // namespace pyllama
