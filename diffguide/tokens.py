def find(tokenizer, prompt, phrase, occurrence=None):
    ids=tokenizer(prompt).input_ids; p=tokenizer(phrase).input_ids[1:-1]
    return [i+j for i in range(len(ids)) if ids[i:i+len(p)]==p for j in range(len(p))]
def columns(tokenizer, prompt): return list(range(1,len(tokenizer(prompt).input_ids)-1))
def find_groups(prompt): return [prompt]
