// What llama.cpp's samplers leave of given logits: the figures of tests/data/sampling.
//
// Build it against llama.cpp's sources and static libraries, then run it; it reads cases from standard input as
// scripts/llama_cpp_sampling.py writes them, one a line:
//
//   vocabulary bias_count (token bias)… last_n repeat frequency presence recent_count token… top_k typical top_p min_p
//   temperature samplers logit…
//
// samplers: a letter for each, as llama.cpp has them, in their order; "-" for none.
//
// and prints for each case: count (token probability)…, best first.
#include <algorithm>
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

static void answer(std::istringstream &in) {
    int vocabulary, count;
    in >> vocabulary >> count;
    std::vector<llama_logit_bias> biases(count);
    for (auto &bias : biases) {
        std::string value;
        in >> bias.token >> value;
        bias.bias = std::stof(value);
    }
    int last_n, top_k, recent;
    float repeat, frequency, presence, typical, top_p, min_p, temperature;
    in >> last_n >> repeat >> frequency >> presence >> recent;
    std::vector<int> tokens(recent);
    for (auto &token : tokens) in >> token;
    std::string order;
    in >> top_k >> typical >> top_p >> min_p >> temperature >> order;
    std::vector<llama_token_data> data(vocabulary);
    for (int id = 0; id < vocabulary; id++) {
        data[id] = {id, 0.0f, 0.0f};
        in >> data[id].logit;
    }
    // The chain of common/sampling.cpp.
    llama_sampler *chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    if (count) llama_sampler_chain_add(chain, llama_sampler_init_logit_bias(vocabulary, count, biases.data()));
    for (char letter : order) {
        llama_sampler *made = nullptr;
        switch (letter) {
        case 'e': made = llama_sampler_init_penalties(vocabulary, last_n, repeat, frequency, presence); break;
        case 'k': made = llama_sampler_init_top_k(top_k); break;
        case 'y': made = llama_sampler_init_typical(typical, 0); break;
        case 'p': made = llama_sampler_init_top_p(top_p, 0); break;
        case 'm': made = llama_sampler_init_min_p(min_p, 0); break;
        case 't': made = llama_sampler_init_temp(temperature); break;
        default: continue;
        }
        llama_sampler_chain_add(chain, made);
    }
    llama_sampler_chain_add(chain, llama_sampler_init_dist(1));
    for (int token : tokens) llama_sampler_accept(chain, token);
    llama_token_data_array array = {data.data(), data.size(), -1, false};
    llama_sampler_apply(chain, &array);
    std::vector<llama_token_data> left(array.data, array.data + array.size);
    std::sort(left.begin(), left.end(), [](const llama_token_data &a, const llama_token_data &b) {
        return a.p != b.p ? a.p > b.p : a.id < b.id;
    });
    std::printf("%zu", left.size());
    for (const auto &one : left) std::printf(" %d %.9g", one.id, one.p);
    std::printf("\n");
    llama_sampler_free(chain);
}

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream in(line);
        answer(in);
    }
}
